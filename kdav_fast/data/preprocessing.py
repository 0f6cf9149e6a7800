"""What happens between a decoded image and the network: one description that every loader implements."""

from dataclasses import dataclass
from typing import Protocol

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
class Preprocessing:
    """Antialiased bilinear resampling and a crop to `size` x `size`, a flip, a normalisation."""

    size: int
    crop: RandomResizedCrop | PaddedCrop | CenterCrop
    flip: bool
    """Mirror every second image, at random."""
    mean: Triple
    std: Triple


def training_preprocessing(config: DataConfig, normalization: Normalization) -> Preprocessing:
    """Augmented, as the config says."""
    crops = {
        "random_resized": RandomResizedCrop(config.crop_area, config.crop_aspect_ratio),
        "padded": PaddedCrop(config.crop_padding),
        "none": CenterCrop(config.image_size),
    }
    return Preprocessing(
        config.image_size,
        crops[config.crop],
        config.flip,
        tuple(normalization.mean),
        tuple(normalization.std),
    )


def evaluation_preprocessing(config: DataConfig, normalization: Normalization) -> Preprocessing:
    """The same for an image at every time: short side, centre crop."""
    resize = config.eval_resize
    if resize is None:
        resize = round(config.image_size / 0.875) if config.crop == "random_resized" else config.image_size
    return Preprocessing(
        config.image_size, CenterCrop(resize), False, tuple(normalization.mean), tuple(normalization.std)
    )
