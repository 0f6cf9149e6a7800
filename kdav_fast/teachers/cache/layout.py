"""What a cache keeps of a view, how many bytes that takes, and where it lies: by arithmetic alone."""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kdav_fast.config.section import Count, Section

MOST_UINT16 = 2**16
"""Classes that 16 bits can tell apart."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


@dataclass(frozen=True)
class Storage:
    """One number format, as those name it that meet in a shard."""

    safetensors: str
    array: np.dtype
    tensor: torch.dtype


STORAGE = {
    "fp64": Storage("F64", np.dtype("<f8"), torch.float64),
    "fp32": Storage("F32", np.dtype("<f4"), torch.float32),
    "int32": Storage("I32", np.dtype("<i4"), torch.int32),
    "fp16": Storage("F16", np.dtype("<f2"), torch.float16),
    "bf16": Storage("BF16", np.dtype("<u2"), torch.bfloat16),  # NumPy has none: it only carries the bits
    "uint16": Storage("U16", np.dtype("<u2"), torch.uint16),
    "int16": Storage("I16", np.dtype("<i2"), torch.int16),
    "uint8": Storage("U8", np.dtype("u1"), torch.uint8),
    "bool": Storage("BOOL", np.dtype("?"), torch.bool),
}


class Parameter(Section):
    """A small array a view that says how the view is made, such as its crop box."""

    dtype: Literal["fp64", "fp32", "int32", "int16", "uint8", "bool"]
    width: Count


@dataclass(frozen=True)
class Part:
    """One tensor of a shard, a row a view."""

    name: str
    storage: Storage
    width: int

    @property
    def bytes(self) -> int:
        """Of a row."""
        return self.storage.array.itemsize * self.width


class Layout(Section):
    """What a cache keeps: it decides the bytes of every shard but for the answers themselves.

    A shard holds a range of images, each in all views; a record is what it keeps of one view of one image.
    """

    images: Count
    """Of the training split, by their positions in it."""
    views: Count
    """Of each image, numbered from 0."""
    classes: Annotated[int, Field(ge=2)]
    width: Count
    """Of the teacher's features."""
    features: Literal["fp16", "bf16", "fp32"] | None = "fp16"
    """None: they are not kept."""
    logits: Literal["fp16", "fp32"] = "fp16"
    top: Count | None = None
    """Of how many classes, those with the highest logits, these are kept, with the mass of all others; None: of all."""
    parameters: dict[Name, Parameter] = Field(default_factory=dict)
    """What says how a view is made, by name."""
    shard_bytes: Count = 64 * 2**20
    """About how large a shard is, which is read and written as a whole."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.top is not None and self.top >= self.classes:
            raise ValueError(
                f"top is {self.top} of {self.classes} classes; give fewer than there are, or none to keep all logits"
            )
        return self

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The tensors of a shard, in their order there: the widest numbers first, so that all are aligned."""
        classes = "uint16" if self.classes <= MOST_UINT16 else "int32"
        formats = [("features", self.features, self.width)] if self.features else []
        if self.top is None:
            formats += [("logits", self.logits, self.classes)]
        else:
            formats += [
                ("top_logits", self.logits, self.top),
                ("top_classes", classes, self.top),
                ("rest", self.logits, 1),
            ]
        formats += [
            (f"view.{name}", parameter.dtype, parameter.width)
            for name, parameter in sorted(self.parameters.items())
        ]
        parts = [Part(name, STORAGE[dtype], width) for name, dtype, width in formats]
        return tuple(sorted(parts, key=lambda part: -part.storage.array.itemsize))

    @property
    def bytes_per_view(self) -> int:
        """Of a record."""
        return sum(part.bytes for part in self.parts)

    @cached_property
    def images_per_shard(self) -> int:
        return min(self.images, max(1, self.shard_bytes // (self.views * self.bytes_per_view)))

    @property
    def shards(self) -> int:
        return -(-self.images // self.images_per_shard)

    def images_of(self, shard: int) -> range:
        """The positions of a shard's images in the training split."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.images))

    def records_of(self, shard: int) -> int:
        return len(self.images_of(shard)) * self.views

    def places(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """The shards of some views, and their rows in these.

        Args:
            index: n positions of images in the training split.
            view: n numbers of views.

        Raises:
            IndexError: there is no such image or view.
        """
        # Narrower numbers than these would overflow in what follows.
        index, view = (np.asarray(numbers).astype(np.int64) for numbers in (index, view))
        for name, numbers, most in (("image", index, self.images), ("view", view, self.views)):
            outside = numbers[(numbers < 0) | (numbers >= most)]
            if len(outside):
                raise IndexError(f"{name} {outside[0]} is none of the cache's {most:,}")
        shard, within = np.divmod(index, self.images_per_shard)
        return shard, within * self.views + view
