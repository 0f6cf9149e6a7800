"""The DALI graph from encoded or decoded images to network input, piece by piece."""

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from kdav_fast.data.dali_draws import Draws, Source
from kdav_fast.data.preprocessing import (
    CenterCrop,
    ColorJitter,
    PaddedCrop,
    Preprocessing,
    RandomResizedCrop,
)

Crop = RandomResizedCrop | PaddedCrop | CenterCrop


def as_source(batches: Iterator, queue: int) -> Source:
    """The batches of an iterator, each kept alive while DALI, which does not copy it, may use it.

    Args:
        batches: lists of arrays, or arrays; endless.
        queue: how many batches the pipeline has in work.
    """
    in_use = deque(maxlen=queue + 2)

    def next_batch(_iteration: int) -> Any:
        in_use.append(next(batches))
        return in_use[-1]

    return next_batch


def decode_and_crop(
    encoded: DataNode,
    crop: Crop,
    size: int,
    draws: Draws,
    device: Literal["cpu", "mixed"],
    **of_gpu: float | bool,
) -> DataNode:
    """From file bytes to S x S x 3 bytes. EXIF rotation is ignored, as by torchvision and with published weights.

    Meant for the GPU ("mixed"): on a CPU, `CpuDecoder` is faster. What is said of the GPU's decoder goes to it.
    """
    options = {"device": device, "output_type": types.RGB, "adjust_orientation": False, **of_gpu}
    if isinstance(crop, RandomResizedCrop):
        return fn.resize(draws.decode_part(encoded, crop, **options), size=(size, size))
    return _fixed_crop(fn.decoders.image(encoded, **options), crop, size, draws, same_size=False)


def crop_pixels(pixels: DataNode, crop: Crop, size: int, draws: Draws, same_size: bool) -> DataNode:
    """From H x W x 3 bytes to S x S x 3 bytes; `same_size` says that H = W = S already."""
    if isinstance(crop, RandomResizedCrop):
        return draws.resized_part(pixels, crop, size)
    return _fixed_crop(pixels, crop, size, draws, same_size)


def _fixed_crop(
    pixels: DataNode, crop: PaddedCrop | CenterCrop, size: int, draws: Draws, same_size: bool
) -> DataNode:
    resize = crop.resize if isinstance(crop, CenterCrop) else size
    if not (same_size and resize == size):
        pixels = _resize_and_center_crop(pixels, resize, size)
    if isinstance(crop, CenterCrop):
        return pixels
    return fn.slice(
        pixels,
        start=draws.shift(crop.padding),
        shape=(size, size),
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=0,
    )


def _resize_and_center_crop(images: DataNode, resize: int, size: int) -> DataNode:
    """torchvision's `Resize(resize)` and `CenterCrop(size)` as one resampling of the window that remains."""
    shape = fn.cast(images.shape()[:2], dtype=types.FLOAT)
    short = math.min(shape[0], shape[1])
    resized = math.floor(shape * resize / short)
    excess = resized - size
    # round(excess / 2) where halves go to the even number, as torchvision rounds
    start = math.floor((excess + 1) / 4) + math.floor((excess + 2) / 4)
    scale = shape / resized
    return fn.resize(images, size=(size, size), roi_start=start * scale, roi_end=(start + size) * scale)


def color_jitter(images: DataNode, jitter: ColorJitter, draws: Draws) -> DataNode:
    """Brightness, contrast, saturation and hue in this order (torchvision shuffles them)."""
    if jitter.brightness:
        images = fn.brightness(images, brightness=draws.factor("brightness", jitter.brightness))
    if jitter.contrast:
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        # Not `fn.contrast`: its centre must lie in the CPU's memory, wherever the images are.
        centre = fn.reductions.mean(grey)
        images = fn.cast_like(centre + (images - centre) * draws.factor("contrast", jitter.contrast), images)
    if jitter.saturation:
        images = fn.saturation(images, saturation=draws.factor("saturation", jitter.saturation))
    if jitter.hue:
        images = fn.hue(images, hue=draws.turn(jitter.hue))
    return images


def normalize(images: DataNode, preprocessing: Preprocessing, draws: Draws) -> DataNode:
    """Flipped at random, (x / 255 - mean) / std; bfloat16, which DALI does not know, comes as float32."""
    mirror = draws.mirror() if preprocessing.flip else 0
    layout = "HWC" if preprocessing.channels_last else "CHW"
    if preprocessing.dtype == torch.uint8:
        return fn.crop_mirror_normalize(images, mirror=mirror, output_layout=layout, dtype=types.UINT8)
    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        mean=[255 * value for value in preprocessing.mean],
        std=[255 * value for value in preprocessing.std],
        output_layout=layout,
        dtype=types.FLOAT16 if preprocessing.dtype == torch.float16 else types.FLOAT,
    )
