"""The formulas on halves: no further from float64 than the same formula is that computes in halves, plus a little."""

import sys

import pytest
import torch

from kdav_fast.distillers.dkd import decoupled_kl
from kdav_fast.distillers.nkd import non_target_cross_entropy, target_cross_entropy
from kdav_fast.distillers.pskd import probability_cross_entropy
from kdav_fast.distillers.terms.levels import batch_and_class_level
from kdav_fast.distillers.terms.softened import soft_target_kl, standardized, virtual_teacher_kl
from kdav_fast.distillers.wsld import soft_cross_entropy
from kdav_fast.distillers.wttm import transformed_teacher_kl

TOLERANCE = 1e-3
FORMULAS = {
    soft_target_kl: lambda f, g, y: soft_target_kl(f, g, 4.0),
    standardized: lambda f, g, y: standardized(f),
    decoupled_kl: lambda f, g, y: torch.stack(decoupled_kl(f, g, y, 4.0)),
    soft_cross_entropy: lambda f, g, y: soft_cross_entropy(f, g, 4.0),
    target_cross_entropy: lambda f, g, y: target_cross_entropy(f, g, y),
    non_target_cross_entropy: lambda f, g, y: non_target_cross_entropy(f, g, y, 3.0),
    transformed_teacher_kl: lambda f, g, y: torch.stack(transformed_teacher_kl(f, g, 0.2)),
    virtual_teacher_kl: lambda f, g, y: virtual_teacher_kl(f, y, 20.0, 1.0),
    probability_cross_entropy: lambda f, g, y: probability_cross_entropy(f, g.float().softmax(1).to(f.dtype)),
    batch_and_class_level: lambda f, g, y: torch.stack(batch_and_class_level(f, g, y >= 0, 2.0)),
}


def value_and_gradient(formula, f, g, labels):
    f = f.clone().requires_grad_()
    value = FORMULAS[formula](f, g, labels)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view_as(value)
    (value.double() * weights).sum().backward()
    return value.detach().double(), f.grad.double()


@pytest.mark.parametrize("peak", [1.0, 30.0])
@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_widening_halves_is_no_worse_than_computing_in_them(formula, dtype, classes, peak, monkeypatch):
    generator = torch.Generator().manual_seed(classes)
    f, g = (peak * torch.randn(13, classes, generator=generator).to(dtype) for _ in range(2))
    inputs = f, g, torch.arange(13) % classes
    found = value_and_gradient(formula, *inputs)
    truth = value_and_gradient(formula, f.double(), g.double(), inputs[2])
    monkeypatch.setattr(sys.modules[formula.__module__], "widened", lambda tensor: tensor)
    in_halves = value_and_gradient(formula, *inputs)
    for ours, theirs, exact in zip(found, in_halves, truth, strict=True):
        assert ours.isfinite().all()
        allowed = (theirs - exact).abs().nan_to_num(torch.inf).max() + TOLERANCE * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
