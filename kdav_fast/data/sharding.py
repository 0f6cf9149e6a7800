"""Which rank sees which images: the rule that DALI's file reader applies, for every loader."""

from dataclasses import dataclass

import numpy as np

from kdav_fast.errors import InputError


@dataclass(frozen=True)
class Shard:
    """One rank's contiguous part of an epoch's order, in batches of B images.

    Rank r of W takes the places [N r // W, N (r + 1) // W), so shards differ by at most one image. All
    ranks make the steps that the largest shard needs and pad by repeating their last image; a rank can
    therefore end on a batch that is padding throughout.

    Raises:
        InputError: fewer images than ranks.
    """

    images: int
    """N, over all ranks."""
    batch_size: int
    """B, of this rank."""
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.images < self.world:
            raise InputError(
                f"{self.images} images cannot be shared by {self.world} ranks; use at most {self.images} ranks"
            )

    @property
    def start(self) -> int:
        """First place of this rank."""
        return self.images * self.rank // self.world

    @property
    def stop(self) -> int:
        """The place after this rank's last one."""
        return self.images * (self.rank + 1) // self.world

    @property
    def steps(self) -> int:
        """Batches an epoch, the same on every rank."""
        largest = -(-self.images // self.world)
        return -(-largest // self.batch_size)

    def batches(self, order: np.ndarray) -> np.ndarray:
        """The part of an epoch's order (N positions) that this rank sees: steps x B, padding included."""
        places = np.arange(self.start, self.start + self.steps * self.batch_size)
        return order[np.minimum(places, self.stop - 1)].reshape(self.steps, self.batch_size)

    def valid(self, step: int) -> np.ndarray:
        """B booleans: which rows of a step are no padding."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size) < self.stop - self.start
