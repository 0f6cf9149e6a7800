"""Pictures made by formula, and what loaders make of them."""

import numpy as np
import torch

from kdav_fast.data.sources.folder import ImageFolder


def smooth_photograph(height, width, seed) -> np.ndarray:
    """H x W x 3: a few colour waves."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [
        np.sin(2 * np.pi * (random.uniform(-4, 4) * x + random.uniform(-4, 4) * y + random.uniform()))
        for _ in range(3)
    ]
    return np.stack([127.5 + 120 * wave for wave in waves], axis=-1).round().astype(np.uint8)


def copies_of(folder: ImageFolder, count: int) -> ImageFolder:
    """One image many times over."""
    return ImageFolder(
        folder.root, folder.split, folder.classes, np.zeros(count, np.int64), folder.paths[:1] * count
    )


def pixels_of(loader) -> torch.Tensor:
    """N x 3 x S x S in 0..255."""
    return torch.cat([batch.images[batch.valid] for batch in loader]) * 255
