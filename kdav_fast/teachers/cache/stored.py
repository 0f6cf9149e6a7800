"""A teacher's answers as a cache keeps them, and back."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kdav_fast.teachers.cache.layout import STORAGE, Layout

Stored = dict[str, Tensor]
"""Tensors by the names of a layout's parts, n rows each: one a view."""


@torch.no_grad()
def to_stored(layout: Layout, features: Tensor | None, logits: Tensor) -> Stored:
    """What is kept of answers. Equal answers give equal bytes, in whatever batch they come.

    Of the `top` highest logits (of equal ones, those of lower classes), these are kept, the highest first, and `rest`,
    the log of the sum of all other classes' exponentials.

    Args:
        features: n x width, of any floating-point format, on any device; may be None where none are kept.
        logits: n x classes, the same.
    """
    kept = {"features": features} if layout.features else {}
    if layout.top is None:
        kept["logits"] = logits
    else:
        ordered, classes = logits.float().sort(dim=1, descending=True, stable=True)
        kept["top_logits"], kept["top_classes"] = ordered[:, : layout.top], classes[:, : layout.top]
        kept["rest"] = ordered[:, layout.top :].logsumexp(1, keepdim=True)
    storage = {part.name: part.storage.tensor for part in layout.parts}
    return {name: values.to(storage[name]) for name, values in kept.items()}


@torch.no_grad()
def to_answers(layout: Layout, stored: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """Features (n x width; None where none are kept) and logits (n x classes) in float32, on the device of `stored`.

    Classes outside the kept ones share the mass of the rest equally: each gets `rest - log(classes - top)`, so that
    the softmax at temperature 1 gives all kept classes the probabilities that the teacher gave them.
    """
    features = stored["features"].float() if layout.features else None
    if layout.top is None:
        return features, stored["logits"].float()
    each = stored["rest"].float() - math.log(layout.classes - layout.top)
    logits = each.repeat(1, layout.classes)
    return features, logits.scatter_(1, stored["top_classes"].long(), stored["top_logits"].float())


def carrying(values: Tensor) -> Tensor:
    """The same bytes in a format that NumPy has, for `Tensor.numpy`."""
    return values.view(torch.uint16) if values.dtype == STORAGE["bf16"].tensor else values
