"""Where the DALI graph has its random numbers from: DALI's own generators, or parameters that it is fed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.auto_aug import rand_augment, trivial_augment
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.data_node import DataNode

from kdav_fast.data.preprocessing import RandAugment, RandomResizedCrop, TrivialAugment
from kdav_fast.data.view_parameters import MAGNITUDES, ViewParameters

Source = Callable[[int], Any]
"""What DALI asks for the input of each batch."""
# torchvision's defaults: nearest pixel, black moves in, the same ranges of strength.
_WARP = {"fill_value": 0, "interp_type": types.INTERP_NN}
_RAND_TRANSLATION = 150 / 331  # share of the side
_TRIVIAL_TRANSLATION = 32  # pixels
# Of what DALI is fed: as what, and with how many dimensions a row.
_FED = {
    "boxes": (np.float32, 1),
    "shifts": (np.int32, 1),
    "flips": (np.int32, 0),
    "brightness": (np.float32, 0),
    "contrast": (np.float32, 0),
    "saturation": (np.float32, 0),
    "hue": (np.float32, 0),
    "operations": (np.int32, 1),
    "magnitudes": (np.int32, 1),
    "negated": (np.int32, 1),
}
_TYPES = {np.float32: types.FLOAT, np.int32: types.INT32}


class Draws(Protocol):
    """The random parts of the graph, of images on whatever device."""

    def decode_part(self, encoded: DataNode, crop: RandomResizedCrop, **options: Any) -> DataNode:
        """A random part of an image, decoded alone; `options` are the decoder's."""

    def resized_part(self, pixels: DataNode, crop: RandomResizedCrop, size: int) -> DataNode:
        """A random part of decoded pixels, resized to S x S."""

    def shift(self, padding: int) -> DataNode:
        """Rows and columns, -padding to padding."""

    def augment(self, images: DataNode, augment: RandAugment | TrivialAugment, size: int) -> DataNode:
        """Automatic augmentation of S x S pixels."""

    def factor(self, name: str, strength: float) -> DataNode:
        """Of brightness, contrast or saturation."""

    def turn(self, strength: float) -> DataNode:
        """Of hue, in degrees."""

    def mirror(self) -> DataNode:
        """1 or 0."""


class OwnDraws:
    """DALI draws; its generators' state is part of the pipeline's checkpoint. See `Draws`."""

    def decode_part(self, encoded: DataNode, crop: RandomResizedCrop, **options: Any) -> DataNode:
        return fn.decoders.image_random_crop(
            encoded, random_area=crop.area, random_aspect_ratio=crop.aspect_ratio, **options
        )

    def resized_part(self, pixels: DataNode, crop: RandomResizedCrop, size: int) -> DataNode:
        return fn.random_resized_crop(
            pixels, size=(size, size), random_area=crop.area, random_aspect_ratio=crop.aspect_ratio
        )

    def shift(self, padding: int) -> DataNode:
        shifts = [float(shift) for shift in range(-padding, padding + 1)]
        return fn.random.uniform(values=shifts, shape=2, dtype=types.INT32)

    def augment(self, images: DataNode, augment: RandAugment | TrivialAugment, size: int) -> DataNode:
        if isinstance(augment, TrivialAugment):
            return trivial_augment.trivial_augment_wide(
                images, max_translate_abs=_TRIVIAL_TRANSLATION, **_WARP
            )
        return rand_augment.rand_augment(
            images,
            n=augment.operations,
            m=augment.magnitude,
            shape=(size, size),
            max_translate_rel=_RAND_TRANSLATION,
            **_WARP,
        )

    def factor(self, name: str, strength: float) -> DataNode:
        return fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))

    def turn(self, strength: float) -> DataNode:
        return fn.random.uniform(range=(-360 * strength, 360 * strength))

    def mirror(self) -> DataNode:
        return fn.random.coin_flip()


class FedDraws:
    """The pipeline is fed `ViewParameters`, and keeps no state. See `Draws`.

    Args:
        source: gives every batch's parameters, as `to_feed` makes them.
        names: which there are; any of `ViewParameters`' fields.
    """

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        kinds = [_FED[name] for name in names]
        self._nodes: dict[str, DataNode] = {}
        if names:
            nodes = fn.external_source(
                source,
                num_outputs=len(names),
                dtype=[_TYPES[dtype] for dtype, _ in kinds],
                ndim=[dimensions for _, dimensions in kinds],
                no_copy=True,
            )
            self._nodes = dict(zip(names, nodes, strict=True))

    def decode_part(self, encoded: DataNode, crop: RandomResizedCrop, **options: Any) -> DataNode:
        return fn.decoders.image_slice(encoded, **self._part(), **options)

    def resized_part(self, pixels: DataNode, crop: RandomResizedCrop, size: int) -> DataNode:
        return fn.resize(fn.slice(pixels, **self._part()), size=(size, size))

    def shift(self, padding: int) -> DataNode:
        return self._nodes["shifts"]

    def augment(self, images: DataNode, augment: RandAugment | TrivialAugment, size: int) -> DataNode:
        if isinstance(augment, TrivialAugment):
            suite = trivial_augment.get_trivial_augment_wide_suite(max_translate_abs=_TRIVIAL_TRANSLATION)
        else:
            suite = rand_augment.get_rand_augment_suite(use_shape=True, max_translate_rel=_RAND_TRANSLATION)
        for step in range(augment.operations):
            # The sign goes with the magnitude: DALI would draw one.
            magnitude = signed_bin(self._nodes["magnitudes"][step], self._nodes["negated"][step])
            images = select(
                suite,
                self._nodes["operations"][step],
                data=images,
                magnitude_bin=magnitude,
                num_magnitude_bins=MAGNITUDES,
                shape=(size, size),
                **_WARP,
            )
        return images

    def factor(self, name: str, strength: float) -> DataNode:
        return self._nodes[name]

    def turn(self, strength: float) -> DataNode:
        return self._nodes["hue"] * 360.0

    def mirror(self) -> DataNode:
        return self._nodes["flips"]

    def _part(self) -> dict[str, DataNode | str]:
        boxes = self._nodes["boxes"]
        return {"rel_start": boxes[:2], "rel_shape": boxes[2:], "axis_names": "WH"}


def to_feed(batches: Iterator[ViewParameters], names: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """What the source of `FedDraws` gives for every batch."""
    for parameters in batches:
        yield tuple(np.ascontiguousarray(getattr(parameters, name), dtype=_FED[name][0]) for name in names)
