"""The contrast at the ends of what a run may ask for, in single precision."""

import math

import pytest
import torch

from kdav_fast.distillers.terms.contrast import noise_contrast


@pytest.mark.parametrize("temperature", [0.03, 0.07, 1000.0])
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 1.0])
def test_any_temperature_that_is_allowed(temperature, cosine):
    images, negatives = 1_281_167, 16384
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        similar = torch.tensor([cosine], dtype=dtype, requires_grad=True)
        others = torch.linspace(-1, 1, 50, dtype=dtype)[None]
        z = images * math.exp(1 / temperature)  # the largest that a first batch may leave
        positive, negative = (torch.exp(each / temperature) / z for each in (similar, others))
        rows = noise_contrast(positive, negative, torch.ones(1, 50, dtype=dtype), negatives / images)
        rows.sum().backward()
        outcomes.append((rows.detach().double(), similar.grad.double()))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)
    assert all(each.isfinite() for each in outcomes[0])
