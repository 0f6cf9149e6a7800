"""Colours: DALI's operations against torchvision's functions, strengths against their distributions."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, uniform
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
)

from kdav_fast.data.dali import DaliLoader
from kdav_fast.data.preprocessing import ColorJitter, RandAugment, TrivialAugment
from kdav_fast.data.torchvision_loader import TorchvisionLoader
from tests.data.pictures import copies_of, pixels_of, smooth_photograph

JITTERS = {
    "brightness": (ColorJitter(0.5, 0, 0, 0), adjust_brightness),
    "contrast": (ColorJitter(0, 0.5, 0, 0), adjust_contrast),
    "saturation": (ColorJitter(0, 0, 0.5, 0), adjust_saturation),
}


@pytest.mark.parametrize("name", JITTERS)
def test_color_jitter_is_torchvision_s_operation_by_a_uniform_factor(make_split, make_loader, name):
    jitter, adjust = JITTERS[name]
    image = smooth_photograph(16, 16, 3) // 3 + 60  # nothing is cut off at 0 or 255
    folder = copies_of(make_split([image]), 256)
    pixels = pixels_of(make_loader(folder, size=16, batch_size=64, preprocessing={"jitter": jitter}))
    original = torch.from_numpy(image).permute(2, 0, 1)
    candidates = torch.linspace(0.48, 1.52, 105)
    adjusted = torch.stack([adjust(original, float(factor)) for factor in candidates]).float()
    distance = (pixels[:, None] - adjusted[None]).abs()
    nearest = distance.mean((2, 3, 4)).argmin(1)
    # One level of rounding on either side, and half a step between the candidates.
    assert distance[torch.arange(len(pixels)), nearest].max() < 3.1
    assert kstest(candidates[nearest].numpy(), uniform(0.5, 1.0).cdf).pvalue > 0.001


@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
def test_hue_turns_the_same_way_as_torchvision_s(make_split, make_loader):
    """DALI turns in YIQ and torchvision in HSV: alike for small turns, never equal, and DALI's are smaller."""
    image = smooth_photograph(16, 16, 3) // 3 + 60
    folder = copies_of(make_split([image]), 256)
    loader = make_loader(folder, size=16, batch_size=64, preprocessing={"jitter": ColorJitter(0, 0, 0, 0.1)})
    original = torch.from_numpy(image).permute(2, 0, 1)
    turns = torch.linspace(-0.12, 0.12, 49)
    turned = torch.stack([adjust_hue(original, float(turn)) for turn in turns]).float()
    distance = (pixels_of(loader)[:, None] - turned[None]).abs().mean((2, 3, 4))
    nearest = turns[distance.argmin(1)]
    assert distance.amin(1).max() < 12
    assert nearest.min() < -0.04
    assert nearest.max() > 0.04
    assert abs(nearest.mean()) < 0.02


@pytest.mark.parametrize("augment", [RandAugment(1, 9), RandAugment(2, 15), TrivialAugment()])
def test_automatic_augmentation_is_as_strong_as_torchvision_s(make_split, make_loader, augment):
    images = [smooth_photograph(48, 48, seed) for seed in range(64)]
    folder = make_split(images * 4)
    original = torch.from_numpy(np.stack(images * 4)).permute(0, 3, 1, 2).float()
    dali, reference = (
        (
            pixels_of(
                make_loader(
                    folder,
                    loader_class=loader_class,
                    size=48,
                    batch_size=64,
                    preprocessing={"augment": augment},
                )
            )
            - original
        )
        .abs()
        .mean((1, 2, 3))
        for loader_class in (DaliLoader, TorchvisionLoader)
    )
    # 256 images spread by about their mean: 6 % of it is one standard deviation of the mean.
    assert abs(dali.mean() / reference.mean() - 1) < 0.25
    assert abs((dali < 0.3).float().mean() - (reference < 0.3).float().mean()) < 0.1
    assert dali.max() > 40
