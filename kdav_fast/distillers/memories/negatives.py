"""Training images of other classes, drawn anew for every step."""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from kdav_fast.config.section import Mark, within

Negatives = Annotated[int, within(1, 2**20, "each image is compared with as many"), Mark.SIZE]
"""K, of a config."""


class OtherClasses(nn.Module):
    """For each image of a batch K images of other classes, without replacement.

    All images of a step draw from one permutation of the training set, each its first K of another class: one product
    with these rows serves the batch, where K rows an image would have to be collected. It depends on seed and step
    alone, so that it is the same on every rank and after a restart.

    Attributes:
        fewest: images of other classes, of the largest class.

    Args:
        labels: N class ids of the training images.
        count: K.
        seed: of the run: another one draws others.
    """

    def __init__(self, labels: np.ndarray, count: int, seed: int) -> None:
        super().__init__()
        # A fact of the data, not of a run's state.
        self.register_buffer("labels", torch.from_numpy(labels.astype(np.int64)), persistent=False)
        self.count, self.seed = count, seed
        largest = int(np.bincount(labels).max())
        self.candidates, self.fewest = min(len(labels), count + largest), len(labels) - largest

    def draw(self, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images M, M being K and the size of the largest class at most, and their weights B x M.

        A row's weights are 1 for its K images and 0 for others. Where there are fewer than K images of other classes,
        they count K together: as often as K draws with replacement would draw them on average.

        Args:
            labels: B class ids.
            step: of the run.
        """
        # Hashed together, as of a number's bits torch's generator on a CPU takes the lower 32.
        entropy = np.random.SeedSequence((self.seed, step)).generate_state(1)[0]
        generator = torch.Generator(self.labels.device).manual_seed(int(entropy))
        order = torch.randperm(len(self.labels), generator=generator, device=self.labels.device)
        index = order[: self.candidates]
        other = self.labels[index] != labels[:, None]
        drawn = other & (other.cumsum(1) <= self.count)
        return index, drawn * (self.count / drawn.sum(1, keepdim=True).clamp(min=1))
