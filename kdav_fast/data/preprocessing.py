"""What happens between a decoded image and the network: one description that every loader implements."""

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from kdav_fast.config import DataConfig

Triple = tuple[float, float, float]


class Normalization(Protocol):
    """RGB mean and standard deviation of what a network expects, for pixels in 0..1."""

    mean: Triple
    std: Triple


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to the square (ImageNet)."""

    area: tuple[float, float]
    """Range of the part's share of the image's area, 0..1."""
    aspect_ratio: tuple[float, float]
    """Range of width / height."""


@dataclass(frozen=True)
class PaddedCrop:
    """The whole square, shifted by up to `padding` pixels each way; black moves in (CIFAR)."""

    padding: int


@dataclass(frozen=True)
class CenterCrop:
    """The middle of the image after its short side was resized to `resize` pixels."""

    resize: int


@dataclass(frozen=True)
class RandAugment:
    """A few random operations of one strength (arXiv 1909.13719)."""

    operations: int
    """How many an image."""
    magnitude: int
    """0..30."""


@dataclass(frozen=True)
class TrivialAugment:
    """One random operation of random strength, of the wide space (arXiv 2103.10158)."""

    operations: ClassVar[int] = 1


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast and saturation by factors in 1 +- strength, then hue by +- `hue` turns."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


@dataclass(frozen=True)
class Preprocessing:
    """Antialiased bilinear resampling and a crop to `size` x `size`, colours, a flip, a normalisation."""

    size: int
    crop: RandomResizedCrop | PaddedCrop | CenterCrop
    flip: bool
    """Mirror every second image, at random."""
    mean: Triple
    std: Triple
    augment: RandAugment | TrivialAugment | None = None
    jitter: ColorJitter | None = None
    """After `augment`."""
    dtype: torch.dtype = torch.float32
    """float32, float16 or bfloat16; uint8 leaves the pixels as they are, 0..255."""
    channels_last: bool = True
    """Memory order: NHWC, or NCHW."""


def training_preprocessing(config: DataConfig, normalization: Normalization) -> Preprocessing:
    """Augmented, as the config says."""
    crops = {
        "random_resized": RandomResizedCrop(config.crop_area, config.crop_aspect_ratio),
        "padded": PaddedCrop(config.crop_padding),
        "none": CenterCrop(config.image_size),
    }
    augmentations = {
        "none": None,
        "rand_augment": RandAugment(config.rand_augment_ops, config.rand_augment_magnitude),
        "trivial_augment": TrivialAugment(),
    }
    return replace(
        _fixed(config, CenterCrop(config.image_size), normalization),
        crop=crops[config.crop],
        flip=config.flip,
        augment=augmentations[config.auto_augment],
        jitter=ColorJitter(*config.color_jitter) if any(config.color_jitter) else None,
    )


def evaluation_preprocessing(config: DataConfig, normalization: Normalization) -> Preprocessing:
    """The same for an image at every time: short side, centre crop."""
    return _fixed(config, _evaluation_crop(config), normalization)


def evaluation_pixels(config: DataConfig) -> Preprocessing:
    """The bytes that `evaluation_preprocessing` normalises."""
    return _bytes(config.image_size, _evaluation_crop(config))


def _evaluation_crop(config: DataConfig) -> CenterCrop:
    resize = config.eval_resize
    if resize is None:
        resize = round(config.image_size / 0.875) if config.crop == "random_resized" else config.image_size
    return CenterCrop(resize)


def square_crop(
    crop: RandomResizedCrop | PaddedCrop | CenterCrop, size: int
) -> RandomResizedCrop | CenterCrop:
    """The part of a crop that needs the whole image; `crop_of_square` does the rest on what it leaves."""
    return CenterCrop(size) if isinstance(crop, PaddedCrop) else crop


def crop_of_square(crop: RandomResizedCrop | PaddedCrop | CenterCrop, size: int) -> PaddedCrop | CenterCrop:
    """What remains to be done after `square_crop`: a shift, or nothing."""
    return crop if isinstance(crop, PaddedCrop) else CenterCrop(size)


def pixel_preprocessing(preprocessing: Preprocessing) -> Preprocessing:
    """The bytes that a resident set keeps, from which the crop of `preprocessing` can still be taken."""
    crop = (
        preprocessing.crop if isinstance(preprocessing.crop, CenterCrop) else CenterCrop(preprocessing.size)
    )
    return _bytes(preprocessing.size, crop)


def _bytes(size: int, crop: CenterCrop) -> Preprocessing:
    return Preprocessing(size, crop, False, (0.0,) * 3, (1.0,) * 3, dtype=torch.uint8)


def resident_preprocessing(preprocessing: Preprocessing) -> Preprocessing:
    """What remains to be done to the bytes that `pixel_preprocessing` makes."""
    if isinstance(preprocessing.crop, CenterCrop):
        return replace(preprocessing, crop=CenterCrop(preprocessing.size))
    return preprocessing


def _fixed(config: DataConfig, crop: CenterCrop, normalization: Normalization) -> Preprocessing:
    """Without anything random."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return Preprocessing(
        config.image_size,
        crop,
        False,
        tuple(normalization.mean),
        tuple(normalization.std),
        dtype=dtypes[config.dtype],
        channels_last=config.layout == "channels_last",
    )
