"""Views that are turned copies of one."""

import torch
from torch import Tensor


def rotations(images: Tensor, count: int) -> Tensor:
    """The images turned counter-clockwise by 0, 90, .. degrees: count*B x 3 x S x S, view-major, in the same memory
    order.

    Args:
        images: B x 3 x S x S.
        count: of views, 1 to 4.
    """
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    turned = torch.empty(
        (count * len(images), *images.shape[1:]),
        dtype=images.dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    for quarters, view in enumerate(turned.chunk(count)):
        view.copy_(images.rot90(quarters, (2, 3)))
    return turned
