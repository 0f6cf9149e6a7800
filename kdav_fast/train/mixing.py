"""Mixup and CutMix, after decoding, so that teacher and student see the same pixels."""

from collections.abc import Callable

import torch

from kdav_fast.config import TrainConfig
from kdav_fast.data import Batch


def build_mix(config: TrainConfig, classes: int) -> Callable[[Batch], Batch]:
    """From a batch of one view to the one that both networks see."""
    if config.mixup == 0 and config.cutmix == 0:
        return lambda batch: batch
    from torchvision.transforms import v2  # seconds to load, for runs that mix

    choices = []
    if config.mixup > 0:
        choices.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix > 0:
        choices.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    mixers = v2.RandomChoice(choices)

    def mix(batch: Batch) -> Batch:
        images, mixed = mixers(batch.images, batch.labels)
        if batch.images.is_contiguous(memory_format=torch.channels_last):
            images = images.contiguous(memory_format=torch.channels_last)
        return batch._replace(images=images, mixed=mixed)

    return mix
