"""Weighted soft labels against the authors' code, and where the labels are learnt."""

import pytest
import torch

from kdav_fast.distillers.wsld import soft_label_weight
from tests.distillers.golden import Golden, golden_cases


@pytest.mark.parametrize("setting", ["", "cifar_"])
@pytest.mark.parametrize("case", golden_cases("WSLD"))
def test_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    distiller = build("wsld", golden.facts, **golden.numbers(temperature="temperature", alpha="alpha"))
    student, teacher = golden.leaves("student_logits", "teacher_logits")
    losses = golden.losses(distiller, [student], [teacher])
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["soft_cross_entropy"], golden["kd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
    rows = (
        torch.nn.functional.cross_entropy(f, golden["target"], reduction="none") for f in (student, teacher)
    )
    agrees(soft_label_weight(*rows), golden["weight"])


def test_an_image_whose_label_the_student_has_learnt_does_not_count():
    weight = soft_label_weight(torch.tensor([0.0, 1e-6, 3.0, 3.0]), torch.tensor([1.0, 1.0, 0.0, 1e-3]))
    torch.testing.assert_close(weight, torch.tensor([0.0, 1e-6, 1.0, 1.0]))
