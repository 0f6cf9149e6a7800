"""What tests of loaders ask of their batches."""

import torch

from kdav_fast.data.preprocessing import ColorJitter, RandAugment, RandomResizedCrop

EVERYTHING = {"flip": True, "augment": RandAugment(2, 9), "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1)}
AUGMENTED = {
    "crop": RandomResizedCrop((0.3, 1.0), (0.75, 4 / 3)),
    "view": EVERYTHING,
    "shuffle": True,
    "seed": 5,
}


def order_of(batches) -> list[int]:
    return torch.cat([batch.index[batch.valid] for batch in batches]).tolist()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for field, other_field in zip(batch, other, strict=True):
            assert torch.equal(field, other_field)
