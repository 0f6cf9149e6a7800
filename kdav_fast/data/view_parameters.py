"""What a view of an image is: the numbers from which its augmentation follows."""

from typing import NamedTuple, Protocol

import numpy as np

from kdav_fast.data.preprocessing import PaddedCrop, Preprocessing, RandomResizedCrop

MAGNITUDES = 31
"""Strengths of automatic augmentation, 0 to 30."""
OPERATIONS = (
    "translate_x",
    "translate_y",
    "shear_x",
    "shear_y",
    "rotate",
    "brightness",
    "contrast",
    "color",
    "sharpness",
    "posterize",
    "solarize",
    "equalize",
    "auto_contrast",
    "identity",
)
"""Of automatic augmentation, in DALI's order; `ViewParameters.operations` are positions in it."""


class ViewParameters(NamedTuple):
    """Of N views, a row each; `None` is what the augmentation does not do.

    Nothing else decides what is done to an image's pixels: the same row makes the same view again.
    """

    boxes: np.ndarray | None = None
    """N x 4 float32, the part that a random crop takes: x, y, width, height as shares of the image's sides. Ends
    are rounded to whole pixels (`pixel_boxes`), so no more than 2^20 pixels a side are exact."""
    shifts: np.ndarray | None = None
    """N x 2 int16, of a padded crop: the window's first row and column, in pixels of the unpadded square."""
    flips: np.ndarray | None = None
    """N booleans: mirrored, left to right."""
    brightness: np.ndarray | None = None
    """N float32, factors of colour jitter; so are the next two."""
    contrast: np.ndarray | None = None
    saturation: np.ndarray | None = None
    hue: np.ndarray | None = None
    """N float32, turns."""
    operations: np.ndarray | None = None
    """N x n uint8, of automatic augmentation, in their order."""
    magnitudes: np.ndarray | None = None
    """N x n uint8: how strong, 0..30."""
    negated: np.ndarray | None = None
    """N x n booleans: the operation goes the other way, where it has two."""


def parameters_of(preprocessing: Preprocessing) -> tuple[str, ...]:
    """The fields of `ViewParameters` that its views have."""
    names = []
    if isinstance(preprocessing.crop, RandomResizedCrop):
        names.append("boxes")
    if isinstance(preprocessing.crop, PaddedCrop):
        names.append("shifts")
    if preprocessing.flip:
        names.append("flips")
    if preprocessing.jitter is not None:
        kinds = ("brightness", "contrast", "saturation", "hue")
        names += [kind for kind in kinds if getattr(preprocessing.jitter, kind)]
    if preprocessing.augment is not None:
        names += ["operations", "magnitudes", "negated"]
    return tuple(names)


class ViewSource(Protocol):
    """Gives V fixed views of every training image."""

    count: int
    """V."""
    needs_sizes: bool
    """Whether `parameters` has to be told how large the images are."""

    def parameters(self, images: np.ndarray, views: np.ndarray, sizes: np.ndarray | None) -> ViewParameters:
        """The views of those numbers, of those images.

        Args:
            images: N positions in the split.
            views: N numbers, 0..V-1.
            sizes: N x 2 int64, height and width in pixels; None unless `needs_sizes`.
        """
        ...


def pixel_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom ends in pixels, N x 4 int64, rounded as DALI does.

    Args:
        boxes: N x 4, as in `ViewParameters`.
        sizes: N x 2, height and width.
    """
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1, dtype=np.float64)
    return np.rint(corners * np.tile(np.asarray(sizes)[:, ::-1], 2)).astype(np.int64)
