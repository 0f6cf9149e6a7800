"""Inverse probability weighting against its formula in float64, and with a loss that rounds to 0."""

import pytest
import torch

from kdav_fast.distillers.ipwd import inverse_probability
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, Saying, golden_cases
from tests.distillers.small_run import STUDENT

WEIGHTS = {
    "temperature": "temperature",
    "weight_label": "ce_weight",
    "weight_label_head": "cls_ce_weight",
    "weight_kl": "kd_weight",
}


@pytest.mark.parametrize("setting", ["", "normalised_"])
@pytest.mark.parametrize("case", golden_cases("IPWD"))
def test_it_is_the_formula(case, setting, build, agrees):
    golden = Golden(case, setting)
    normalised = setting == "normalised_"
    distiller = build("ipwd", golden.facts, normalize_weights=normalised, **golden.numbers(**WEIGHTS))
    student, head = golden.leaves("student_logits", "student_cls_logits")
    losses = golden.losses(
        distiller, [student], [golden["teacher_logits"]], learned={"label_head": Saying(head)}
    )
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["label_head_cross_entropy"], golden["ce_cls"])
    agrees(losses.parts["weighted_kl"], golden["kd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
    agrees(head.grad, golden["grad_student_cls_logits"])
    rows = (torch.nn.functional.cross_entropy(f, golden["target"], reduction="none") for f in (student, head))
    agrees(inverse_probability(*rows), golden["weight"])


def test_a_loss_that_rounds_to_0_leaves_weights_finite():
    weight = inverse_probability(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.5, 1.0, 0.0]))
    assert weight.isfinite().all()
    assert weight[1:].tolist() == [1.5, 1.0]


def test_a_student_without_features_has_no_second_head(build):
    with pytest.raises(InputError, match="has no layer whose input could serve as features"):
        build("ipwd", {"student": STUDENT._replace(features=0)})
