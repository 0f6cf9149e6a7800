"""Mixup and CutMix against their definitions."""

import torch

from kdav_fast.config import TrainConfig
from kdav_fast.data import Batch
from kdav_fast.train.mixing import build_mix


def batch_of(size=8, classes=4):
    torch.manual_seed(3)
    images = torch.randn(size, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    index = torch.arange(size)
    return Batch(images, index % classes, torch.ones(size, dtype=torch.bool), index)


def test_no_mixing_leaves_the_batch_alone():
    batch = batch_of()
    assert build_mix(TrainConfig(), 4)(batch) is batch


def test_mixup_blends_pixels_and_shares_alike():
    batch = batch_of()
    mixed = build_mix(TrainConfig(mixup=1.0), 4)(batch)
    partner = batch.images.roll(1, 0)
    share = mixed.mixed[0, batch.labels[0]]
    torch.testing.assert_close(mixed.images, share * batch.images + (1 - share) * partner)
    torch.testing.assert_close(mixed.mixed.sum(1), torch.ones(8))
    assert 0 < share < 1
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)


def test_what_is_known_of_the_images_stays():
    batch = batch_of()
    mixed = build_mix(TrainConfig(cutmix=1.0), 4)(batch)
    assert mixed.labels is batch.labels
    assert mixed.valid is batch.valid
    assert mixed.index is batch.index
    assert mixed.views == 1


def test_cutmix_takes_each_pixel_from_one_of_two_images():
    batch = batch_of()
    mixed = build_mix(TrainConfig(cutmix=1.0), 4)(batch)
    own = (mixed.images == batch.images).all(1)
    other = (mixed.images == batch.images.roll(1, 0)).all(1)
    assert (own | other).all()
    torch.testing.assert_close(mixed.mixed[0, batch.labels[0]], own[0].float().mean())


def test_both_mixings_take_turns():
    torch.manual_seed(0)
    batch, mix = batch_of(), build_mix(TrainConfig(mixup=1.0, cutmix=1.0), 4)
    kinds = set()
    for _ in range(20):
        images = mix(batch).images
        kinds.add(bool(((images == batch.images) | (images == batch.images.roll(1, 0))).all()))
    assert kinds == {True, False}
