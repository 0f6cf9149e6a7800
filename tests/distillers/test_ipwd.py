"""Inverse probability weighting against its formula in float64, and with a loss that rounds to 0."""

import pytest
import torch

from kdav_fast.data import Batch
from kdav_fast.distillers.base import Progress
from kdav_fast.distillers.ipwd import inverse_probability
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
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
    settings = golden.numbers(**WEIGHTS) | {"standardize_weights": False, "normalize_weights": normalised}
    distiller = build("ipwd", golden.facts, **settings)
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


def test_no_image_outweighs_all_others_by_default(build):
    """The student is all but sure of one image, the head that learns from labels wrong: raw logits would say 10^8."""
    logits = torch.tensor([[20.0, 0, 0, 0], [1.0, 0, 0, 0]], dtype=torch.float64)
    head = torch.tensor([[0.0, 0, 0, 20.0], [1.0, 0, 0, 0]], dtype=torch.float64)
    target = torch.zeros(2, dtype=torch.int64)
    kls = {}
    for standardized in (True, False):
        distiller = build("ipwd", {"classes": 4}, standardize_weights=standardized, temperature=1.0)
        outputs = [Outputs(each, each) for each in (logits.clone().requires_grad_(), -logits)]
        batch = Batch(logits, target, torch.ones(2, dtype=torch.bool), torch.arange(2))
        losses = distiller(*outputs, batch, {"label_head": Saying(head)}, Progress(0, 1, 0.0, 1.0))
        kls[standardized] = losses.parts["weighted_kl"].item()
    z = logits[0] - logits[0].mean()
    z = z / z.square().mean().sqrt()  # of the other head, the same values elsewhere
    log_sum = z.exp().sum().log()
    weight = 1 + (log_sum - z[3]) / (log_sum - z[0])
    each = (logits.neg().softmax(1) * (logits.neg().log_softmax(1) - logits.log_softmax(1))).sum(1)
    torch.testing.assert_close(kls[True], ((weight * each[0] + 2 * each[1]) / 2).item())
    assert kls[False] > 1e6


def test_a_student_without_features_has_no_second_head(build):
    with pytest.raises(InputError, match="has no layer whose input could serve as features"):
        build("ipwd", {"student": STUDENT._replace(features=0)})
