"""Formulas on features in halves: as exact as the rounding of what comes out allows."""

import pytest
import torch

from kdav_fast.distillers.at import attention_mse
from kdav_fast.distillers.norm import many_to_one, scaled_logits
from kdav_fast.distillers.pkt import similarity_kl
from kdav_fast.distillers.reviewkd import hierarchical_context
from kdav_fast.distillers.rkd import angle_huber, distance_huber
from kdav_fast.distillers.sp import similarity_mse
from kdav_fast.distillers.terms.maps import row_mse
from kdav_fast.distillers.vid import gaussian_nll

TOLERANCE = 1e-3
ROWS, WIDTH, SIDE = 9, 5, 6
VALID = torch.arange(ROWS) != 4
FORMULAS = {
    row_mse: row_mse,
    attention_mse: attention_mse,
    gaussian_nll: lambda f, g: gaussian_nll(f, g, torch.linspace(-3, 9, WIDTH, dtype=f.dtype)),
    hierarchical_context: hierarchical_context,
    many_to_one: lambda f, g: many_to_one(f.repeat(1, 3, 1, 1), g),
    scaled_logits: lambda f, g: scaled_logits(f.flatten(1)),
    similarity_mse: lambda f, g: similarity_mse(*padded(f, g), VALID),
    similarity_kl: lambda f, g: similarity_kl(*(each.flatten(1) for each in padded(f, g)), VALID),
    distance_huber: lambda f, g: distance_huber(*(each.flatten(1) for each in padded(f, g)), VALID),
    angle_huber: lambda f, g: angle_huber(*(each.flatten(1) for each in padded(f, g)), VALID),
}


def padded(*maps):
    return (each.masked_fill(~VALID[:, None, None, None], 0.0) for each in maps)


def value_and_gradient(formula, f, g):
    f = f.clone().requires_grad_()
    value = FORMULAS[formula](f, g)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view_as(value)
    (value.double() * weights).sum().backward()
    return value.detach().double(), f.grad.double()


@pytest.mark.parametrize("size", [1.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_halves_are_widened(formula, dtype, size):
    generator = torch.Generator().manual_seed(0)
    f, g = (size * torch.randn(ROWS, WIDTH, SIDE, SIDE, generator=generator).to(dtype) for _ in range(2))
    if formula is gaussian_nll:  # its variances are in halves, too
        f, g = f / size, g / size
    (value, gradient), (exact, exact_gradient) = (
        value_and_gradient(formula, *each) for each in ((f, g), (f.double(), g.double()))
    )
    assert (value - exact).abs().max() <= TOLERANCE * exact.abs().max()
    rounding = torch.finfo(dtype).eps * exact_gradient.abs().max() + torch.finfo(dtype).tiny
    assert gradient.isfinite().all()
    assert (gradient - exact_gradient).abs().max() <= rounding + TOLERANCE * exact_gradient.abs().max()
