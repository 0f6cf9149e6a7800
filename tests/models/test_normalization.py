"""Renormalisation against doing it by hand, through pixels, in float64."""

import pytest
import torch
from torch import nn

from kdav_fast.models import IMAGENET, Normalization, Renormalize, renormalization

HALVES = Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DARK = Normalization(mean=(0.05, 0.1, 0.2), std=(0.11, 0.07, 0.3))


def normalize(pixels: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in normalization)
    return (pixels - mean) / std


@pytest.mark.parametrize(("given", "wanted"), [(IMAGENET, HALVES), (HALVES, IMAGENET), (DARK, IMAGENET)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-6), (torch.float32, 1e-5)])
def test_equals_normalising_the_pixels_again(given, wanted, dtype, tolerance):
    pixels = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = Renormalize(given, wanted)(normalize(pixels, given).to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), normalize(pixels, wanted), rtol=0, atol=tolerance)


def test_there_and_back_is_the_identity():
    images = torch.randn(1, 3, 4, 4)
    there_and_back = nn.Sequential(Renormalize(IMAGENET, DARK), Renormalize(DARK, IMAGENET))
    torch.testing.assert_close(there_and_back(images), images, rtol=1e-5, atol=1e-5)


def test_equal_normalisations_need_nothing():
    assert isinstance(renormalization(IMAGENET, Normalization(*IMAGENET)), nn.Identity)
    assert isinstance(renormalization(IMAGENET, HALVES), Renormalize)


def test_memory_format_and_half_precision_stay():
    images = torch.randn(2, 3, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    result = Renormalize(IMAGENET, HALVES)(images)
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_checkpoints_do_not_see_it():
    assert not Renormalize(IMAGENET, HALVES).state_dict()
