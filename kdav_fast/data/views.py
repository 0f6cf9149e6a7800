"""Which images a method wants to see together: the views of a batch."""

from dataclasses import dataclass
from typing import ClassVar

from kdav_fast.errors import InputError


@dataclass(frozen=True)
class Shuffled:
    """Each image once an epoch, in one view."""

    count: ClassVar[int] = 1
    loaded: ClassVar[int] = 1


@dataclass(frozen=True)
class Views:
    """Each image in `count` views: as many augmentations, drawn independently."""

    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 2:
            raise InputError(
                f"Views: count is {self.count}; it must be at least 2, and Shuffled() is one view"
            )

    @property
    def loaded(self) -> int:
        return self.count


@dataclass(frozen=True)
class Rotations:
    """One augmentation of each image, turned by 0, 90, 180 and 270 degrees, counter-clockwise: four views.

    With a `count` below 4 only the first of these.
    """

    count: int = 4
    loaded: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 2 <= self.count <= 4:
            raise InputError(f"Rotations: count is {self.count}; allowed: 2, 3, 4")


@dataclass(frozen=True)
class ClassPairs:
    """Each image, and as its second view another image of its class, drawn anew for every epoch.

    Drawn with replacement: it may be the same image, and of a class with one image it is, in another augmentation.
    """

    count: ClassVar[int] = 2
    loaded: ClassVar[int] = 2


Order = Shuffled | Views | Rotations | ClassPairs
"""Of training images; each row of `Batch.index` is the image of the first view.

`count` is V, the views of a batch; `loaded` of them are read and augmented, the others made of these.
"""
