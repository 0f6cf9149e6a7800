"""Which images a method wants to see together: the views of a batch."""

from typing import NamedTuple


class Shuffled(NamedTuple):
    """Each image once an epoch, in one view."""

    count: int = 1


class Views(NamedTuple):
    """Each image in `count` views: as many augmentations, drawn independently."""

    count: int = 2


class Rotations(NamedTuple):
    """One augmentation of each image, turned by 0, 90, 180 and 270 degrees, counter-clockwise: four views."""

    count: int = 4


class ClassPairs(NamedTuple):
    """Each image, and as its second view another image of its class, drawn anew for every epoch.

    Drawn with replacement: it may be the same image, and of a class with one image it is, in another augmentation.
    """

    count: int = 2


Order = Shuffled | Views | Rotations | ClassPairs
"""Of training images; each row of `Batch.index` is the image of the first view."""
