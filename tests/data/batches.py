"""What tests of loaders ask of their batches."""

import torch

from kdav_fast.data.preprocessing import ColorJitter, RandAugment, RandomResizedCrop

EVERYTHING = {"flip": True, "augment": RandAugment(2, 9), "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1)}
AUGMENTED = {
    "crop": RandomResizedCrop((0.3, 1.0), (0.75, 4 / 3)),
    "preprocessing": EVERYTHING,
    "shuffle": True,
    "seed": 5,
}


def order_of(batches) -> list[int]:
    return torch.cat([batch.index[batch.valid] for batch in batches]).tolist()


def assert_equal(batches, others):
    """To the last bit, images included."""
    assert_same_images(batches, others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.images, other.images)


def assert_same_images(batches, others):
    """Whatever their augmentation."""
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.valid, other.valid)
        assert torch.equal(batch.index, other.index)
        assert (batch.mixed, batch.views) == (None, other.views)
