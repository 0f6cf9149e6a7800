"""Mixup and CutMix, after decoding, so that teacher and student see the same pixels."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdav_fast.config import TrainConfig
from kdav_fast.data import Batch
from kdav_fast.distillers import Target

Mix = Callable[[Batch], tuple[Tensor, Target]]


def build_mix(config: TrainConfig, classes: int) -> Mix:
    """From a batch to the images both networks see and what is known of them."""
    if config.mixup == 0 and config.cutmix == 0:
        return lambda batch: (batch.images, Target(batch.target, batch.valid))
    from torchvision.transforms import v2  # seconds to load, for runs that mix

    choices = []
    if config.mixup > 0:
        choices.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix > 0:
        choices.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    mixers = v2.RandomChoice(choices)

    def mix(batch: Batch) -> tuple[Tensor, Target]:
        images, mixed = mixers(batch.images, batch.target)
        if batch.images.is_contiguous(memory_format=torch.channels_last):
            images = images.contiguous(memory_format=torch.channels_last)
        return images, Target(batch.target, batch.valid, mixed)

    return mix
