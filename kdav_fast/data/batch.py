"""What every loader yields and what it promises: the one record from the loader to the loss."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """B images of one rank, each seen in V views.

    Every batch of a loader has the same B; rows that only fill it up are not valid.
    """

    images: Tensor
    """V*B x 3 x S x S, all rows of the first view first; normalised by the loader's mean and std; dtype and memory
    order as its preprocessing says."""
    labels: Tensor
    """B class ids, int64; of a mixed image, that of the image it started from."""
    valid: Tensor
    """B booleans: False marks padding, which must enter no metric and no memory. All may be False."""
    index: Tensor
    """B int64: which image of the split this is (a position in its `ImageSet`)."""
    mixed: Tensor | None = None
    """B x K class shares, where mixup or CutMix made the images."""
    views: int = 1
    """V."""
    view: Tensor | None = None
    """Which of its image's fixed views (`data.views`) each row is, int64; for `Rotations` of the first B, since the
    others are made of these. None where augmentation has no end."""

    @property
    def foremost(self) -> Tensor:
        """B class ids: of a mixed image the class of the largest share, else the label."""
        return self.labels if self.mixed is None else self.mixed.argmax(1)

    @property
    def valid_rows(self) -> Tensor:
        """V*B booleans: `valid` of every row of `images`."""
        return self.valid.repeat(self.views)


class Loader(Protocol):
    """One split of a data set, as one rank sees it."""

    batches_per_epoch: int
    """The same on every rank."""
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
