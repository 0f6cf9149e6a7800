"""Universal self-distillation against the authors' code, and its soft labels."""

import pytest
import torch

from kdav_fast.distillers.uskd import zipf_labels
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, Saying, golden_cases
from tests.distillers.small_run import STUDENT


@pytest.mark.parametrize("setting", ["", "cifar_"])
@pytest.mark.parametrize("case", golden_cases("USKD"))
def test_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    distiller = build(
        "uskd", golden.facts, form="code", **golden.numbers(alpha="alpha", beta="beta", mu="mu")
    )
    student, weak = golden.leaves("student_logits", "weak_logits")
    losses = golden.losses(
        distiller, [student], learned={"weak_head": Saying(weak)}, stages=(torch.zeros(1, 1, 1, 1),) * 2
    )
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["target_cross_entropy"], golden["kd_target"])
    agrees(losses.parts["non_target_cross_entropy"], golden["kd_nontarget"])
    agrees(losses.parts["weak_cross_entropy"], golden["kd_weak"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
    agrees(weak.grad, golden["grad_weak_logits"])


def test_soft_labels_follow_zipf_s_law_by_both_answers():
    student = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    weak = torch.tensor([[0.2, 0.5, 0.2, 0.1]])
    target = torch.tensor([[True, False, False, False]])
    # 0.2 + 0.625, 0.6 + 0.25, 0.2 + 0.125 of the others, and 1 + 0.25 of the target, which is first.
    expected = torch.tensor([[0.0, 1 / 3, 1 / 2, 1 / 4]])
    torch.testing.assert_close(zipf_labels(student, weak, target), expected / expected.sum())


def test_a_network_of_one_stage_has_none_before_the_last(build):
    with pytest.raises(InputError, match="has one stage, and distiller.name 'uskd' reads the one before"):
        build("uskd", {"student": STUDENT._replace(stages=STUDENT.stages[:1])})
