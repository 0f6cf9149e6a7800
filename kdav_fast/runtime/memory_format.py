"""NHWC or NCHW, layer by layer: one kind of convolution crashes in NHWC on a CPU (docs/upstream.md)."""

from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["channels_last", "contiguous"]
SAFE_CHANNELS = 16
"""oneDNN's block of input channels with AVX-512 (8 with AVX2)."""


def unsafe_in_channels_last(network: nn.Module) -> dict[str, nn.Conv2d]:
    """By name, the convolutions whose backward pass on a CPU writes past its memory in NHWC.

    1x1, strided, with fewer input channels than a block, where oneDNN packs the strided pixels first (its issue
    6035): a crash, a hang or wrong gradients, depending on size, batch and processor.
    """
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels < SAFE_CHANNELS
    }


def guard_unsafe_layers(network: nn.Module, layout: Layout, device: torch.device) -> None:
    """Let the unsafe convolutions of a network that is trained on a CPU compute in NCHW; once for a network.

    The rest of it stays in `layout`, that of its images.
    """
    if layout == "channels_last" and device.type == "cpu":
        for layer in unsafe_in_channels_last(network).values():
            layer.register_forward_pre_hook(_images_to_contiguous)
            layer.register_forward_hook(_output_to_channels_last)


def set_layout(network: nn.Module, layout: Layout, device: torch.device) -> None:
    """Bring a network's weights into `layout`, but those of its unsafe convolutions on a CPU into NCHW."""
    if layout == "contiguous":
        return  # as they are made and loaded
    network.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        for layer in unsafe_in_channels_last(network).values():
            layer.weight.data = _contiguous(layer.weight.data)


def _images_to_contiguous(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_contiguous(images) for images in inputs)


def _output_to_channels_last(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def _contiguous(tensor: Tensor) -> Tensor:
    """NCHW strides. `contiguous()` would leave a 1x1 weight or a single channel as it is, which counts as both."""
    return tensor.clone(memory_format=torch.contiguous_format)
