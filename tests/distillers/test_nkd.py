"""Normalised KD against the authors' code, and where probabilities are below any float."""

import pytest
import torch

from kdav_fast.distillers.nkd import non_target_cross_entropy, target_cross_entropy
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, golden_cases


@pytest.mark.parametrize("setting", ["", "cifar_"])
@pytest.mark.parametrize("case", golden_cases("NKD"))
def test_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    distiller = build("nkd", golden.facts, **golden.numbers(temperature="temperature", gamma="gamma"))
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(distiller, [student], [golden["teacher_logits"]])
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["target_cross_entropy"], golden["kd_target"])
    agrees(losses.parts["non_target_cross_entropy"], golden["kd_nontarget"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_exact_where_the_others_probabilities_are_below_any_float(dtype):
    f = torch.tensor([[1000, 0, 1], [0, 1000, 1]], dtype=dtype, requires_grad=True)
    g = torch.tensor([[1000, 1, 0], [1000, 1, 0]], dtype=dtype)
    labels = torch.tensor([0, 0])

    def both(f, g):
        return target_cross_entropy(f, g, labels), non_target_cross_entropy(f, g, labels, 1.0)

    sum(both(f, g)).sum().backward()
    assert f.grad.isfinite().all()
    for found, truth in zip(both(f.detach(), g), both(f.detach().double(), g.double()), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


def test_one_class_has_no_others(build):
    with pytest.raises(InputError, match="'nkd' tells a class from the others, but the data have one class"):
        build("nkd", {"classes": 1})
