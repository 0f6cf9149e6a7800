"""What every loader yields and what it promises."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """B images of one rank. Every batch of a loader has the same B; rows that only fill it up are not valid."""

    images: Tensor
    """B x 3 x S x S, normalised by the loader's mean and std; dtype and memory order as its preprocessing says."""
    target: Tensor
    """B class ids, int64."""
    valid: Tensor
    """B booleans: False marks padding, which must enter no metric and no memory. All may be False."""
    index: Tensor
    """B int64: which image of the split this is (a position in its `ImageSet`)."""


class Loader(Protocol):
    """One split of a data set, as one rank sees it."""

    steps_per_epoch: int
    """Batches an epoch; the same on every rank."""
    images_per_epoch: int
    """Images an epoch over all ranks, padding excluded."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch, then stand at the start of the next one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position, order and random state of this rank as JSON values; exact in the middle of an epoch."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            InputError: it is of another data set, or of another number of ranks where that is not allowed.
        """
        ...
