"""torchvision's transforms from a PIL image to the network's input, drawn at random."""

import torch
from torchvision.transforms import v2

from kdav_fast.data.preprocessing import (
    CenterCrop,
    ColorJitter,
    PaddedCrop,
    Preprocessing,
    RandAugment,
    RandomResizedCrop,
    TrivialAugment,
)


def transform(preprocessing: Preprocessing) -> v2.Compose:
    """From a PIL image to the network's input."""
    steps = [
        *_crop(preprocessing),
        *_augment(preprocessing.augment),
        *_jitter(preprocessing.jitter),
        *([v2.RandomHorizontalFlip()] if preprocessing.flip else []),
        *to_input(preprocessing),
    ]
    return v2.Compose(steps)


def to_input(preprocessing: Preprocessing) -> list[v2.Transform]:
    """The last steps, which are not random."""
    if preprocessing.dtype == torch.uint8:
        return [v2.PILToTensor()]
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing.mean, preprocessing.std),
        v2.ToDtype(preprocessing.dtype),
    ]


def _crop(preprocessing: Preprocessing) -> list[v2.Transform]:
    size = preprocessing.size
    match preprocessing.crop:
        case RandomResizedCrop(area, aspect_ratio):
            return [v2.RandomResizedCrop(size, area, aspect_ratio)]
        case PaddedCrop(padding):
            return [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, padding)]
        case CenterCrop(resize):
            return [v2.Resize(resize), v2.CenterCrop(size)]


def _augment(augment: RandAugment | TrivialAugment | None) -> list[v2.Transform]:
    match augment:
        case RandAugment(operations, magnitude):
            return [v2.RandAugment(operations, magnitude)]
        case TrivialAugment():
            return [v2.TrivialAugmentWide()]
        case None:
            return []


def _jitter(jitter: ColorJitter | None) -> list[v2.Transform]:
    if jitter is None:
        return []
    return [v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)]
