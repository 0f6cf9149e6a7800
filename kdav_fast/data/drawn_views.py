"""Views without a file: every number follows from (seed, image, view)."""

import numpy as np

from kdav_fast.data.counter_random import keys, stream, uniform
from kdav_fast.data.preprocessing import (
    ColorJitter,
    PaddedCrop,
    Preprocessing,
    RandAugment,
    RandomResizedCrop,
    TrivialAugment,
)
from kdav_fast.data.view_parameters import MAGNITUDES, OPERATIONS, ViewParameters

_VIEWS = 2  # what the seed is used for, beside what else is drawn from it
_ATTEMPTS = 10  # as torchvision and DALI make
# Which of a view's random numbers is for what. A place of its own for each: the crop is the same with and without
# jitter. What varies in number comes last.
_AREAS = slice(0, _ATTEMPTS)
_ASPECTS = slice(_ATTEMPTS, 2 * _ATTEMPTS)
_PLACE = slice(20, 22)
_SHIFT = slice(22, 24)
_FLIP = 24
_JITTER = slice(25, 29)
_AUGMENT = 29


class DrawnViews:
    """V views of every image, the same in every process, epoch and run with this seed. See `ViewSource`.

    With flips alone there are but two: the image as it is, and mirrored.

    Args:
        count: V.
        seed: of the run.
        preprocessing: what is drawn for.
    """

    def __init__(self, count: int, seed: int, preprocessing: Preprocessing) -> None:
        self.count = count
        self.needs_sizes = isinstance(preprocessing.crop, RandomResizedCrop)
        self._key = stream(seed, _VIEWS)
        self._preprocessing = preprocessing

    def parameters(self, images: np.ndarray, views: np.ndarray, sizes: np.ndarray | None) -> ViewParameters:
        wanted, augment = self._preprocessing, self._preprocessing.augment
        operations = augment.operations if augment else 0
        numbers = uniform(keys(self._key, images, views), _AUGMENT + 3 * operations)
        drawn = {}
        if isinstance(wanted.crop, RandomResizedCrop):
            drawn["boxes"] = _random_parts(numbers, sizes, wanted.crop)
        if isinstance(wanted.crop, PaddedCrop):
            steps = 2 * wanted.crop.padding + 1
            drawn["shifts"] = (_below(numbers[:, _SHIFT], steps) - wanted.crop.padding).astype(np.int16)
        if wanted.flip:
            drawn["flips"] = views % 2 == 1 if flips_alone(wanted) else numbers[:, _FLIP] < 0.5
        if wanted.jitter is not None:
            drawn |= _factors(numbers[:, _JITTER], wanted.jitter)
        if augment is not None:
            drawn |= _operations(numbers[:, _AUGMENT:].reshape(len(images), operations, 3), augment)
        return ViewParameters(**drawn)


def flips_alone(preprocessing: Preprocessing) -> bool:
    """Whether nothing is random but the flip."""
    random_crop = isinstance(preprocessing.crop, RandomResizedCrop | PaddedCrop)
    return preprocessing.flip and not (random_crop or preprocessing.augment or preprocessing.jitter)


def _random_parts(numbers: np.ndarray, sizes: np.ndarray, crop: RandomResizedCrop) -> np.ndarray:
    """Boxes as in `ViewParameters`: the first of ten attempts that lies in the image, else its middle. As torchvision's
    `RandomResizedCrop` (Szegedy et al. 2015), step by step."""
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    least, most = crop.aspect_ratio
    area = height * width * _between(numbers[:, _AREAS], *crop.area)
    aspect = np.exp(_between(numbers[:, _ASPECTS], np.log(least), np.log(most)))
    wide, high = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
    chosen = fits.argmax(1)[:, None]
    extent = np.concatenate([np.take_along_axis(side, chosen, 1) for side in (wide, high)], axis=1)
    whole = np.concatenate([width, height], axis=1)
    place = np.floor(numbers[:, _PLACE][:, ::-1] * (whole - extent + 1))
    middle = np.maximum(
        1,
        np.concatenate(
            [np.minimum(width, np.rint(height * most)), np.minimum(height, np.rint(width / least))], axis=1
        ),
    )
    fitted = fits.any(1)[:, None]
    extent = np.where(fitted, extent, middle)
    place = np.where(fitted, place, np.floor((whole - middle) / 2))
    return np.concatenate([place / whole, extent / whole], axis=1, dtype=np.float32)


def _factors(numbers: np.ndarray, jitter: ColorJitter) -> dict[str, np.ndarray]:
    drawn = {}
    for name, column in zip(("brightness", "contrast", "saturation", "hue"), numbers.T, strict=True):
        if strength := getattr(jitter, name):
            low, high = (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
            drawn[name] = _between(column, low, high).astype(np.float32)
    return drawn


def _operations(numbers: np.ndarray, augment: RandAugment | TrivialAugment) -> dict[str, np.ndarray]:
    """From N x n x 3 numbers."""
    magnitudes = _below(numbers[:, :, 1], MAGNITUDES)
    if isinstance(augment, RandAugment):
        magnitudes = np.full_like(magnitudes, augment.magnitude)
    return {
        "operations": _below(numbers[:, :, 0], len(OPERATIONS)).astype(np.uint8),
        "magnitudes": magnitudes.astype(np.uint8),
        "negated": numbers[:, :, 2] < 0.5,
    }


def _between(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * numbers


def _below(numbers: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers 0..count-1."""
    return (numbers * count).astype(np.int64)
