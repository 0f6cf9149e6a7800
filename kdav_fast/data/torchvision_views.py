"""Fixed views by Pillow and torchvision's functions: what `dali_graph` does with the same parameters."""

import math
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kdav_fast.data.preprocessing import (
    CenterCrop,
    PaddedCrop,
    Preprocessing,
    RandAugment,
    RandomResizedCrop,
    TrivialAugment,
)
from kdav_fast.data.torchvision_transform import to_input
from kdav_fast.data.view_parameters import MAGNITUDES, OPERATIONS, ViewParameters, pixel_boxes

_JITTER = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def show(image: Image.Image, preprocessing: Preprocessing, parameters: ViewParameters) -> Tensor:
    """The network's input, 3 x S x S, of an image in one view: `parameters` has one row."""
    image = _crop(image, preprocessing, parameters)
    if preprocessing.augment is not None:
        steps = zip(
            *(one[0].tolist() for one in (parameters.operations, parameters.magnitudes, parameters.negated)),
            strict=True,
        )
        for operation, magnitude, negated in steps:
            image = _operate(image, preprocessing.augment, OPERATIONS[operation], magnitude, negated)
    for name, adjust in _JITTER.items():
        if (factor := getattr(parameters, name)) is not None:
            image = adjust(image, float(factor[0]))
    if preprocessing.flip and parameters.flips[0]:
        image = F.horizontal_flip(image)
    return v2.Compose(to_input(preprocessing))(image)


def _crop(image: Image.Image, preprocessing: Preprocessing, parameters: ViewParameters) -> Image.Image:
    size = [preprocessing.size] * 2
    match preprocessing.crop:
        case RandomResizedCrop():
            ((left, top, right, bottom),) = pixel_boxes(
                parameters.boxes, [[image.height, image.width]]
            ).tolist()
            return F.resized_crop(image, top, left, bottom - top, right - left, size)
        case PaddedCrop():
            square = F.center_crop(F.resize(image, size[:1]), size)
            return F.crop(square, *parameters.shifts[0].tolist(), *size)
        case CenterCrop(resize):
            return F.center_crop(F.resize(image, [resize]), size)


class _Ranges(NamedTuple):
    """Of automatic augmentation, from the weakest to the strongest, as DALI has them."""

    translation: float
    """Pixels."""
    shear: float
    """Tangent."""
    rotation: float
    """Degrees."""
    enhancement: tuple[float, float]
    """A factor's distance from 1."""
    bits: int
    """That posterizing takes away."""


def _operate(
    image: Image.Image, augment: RandAugment | TrivialAugment, operation: str, magnitude: int, negated: bool
) -> Image.Image:
    if isinstance(augment, TrivialAugment):
        ranges = _Ranges(32, 0.99, 135, (0.01, 0.99), 6)
    else:
        ranges = _Ranges(150 / 331 * image.width, 0.3, 30, (0, 0.9), 4)
    strength = magnitude / (MAGNITUDES - 1)
    sign = -1 if negated else 1
    enhanced = 1 + sign * (ranges.enhancement[0] * (1 - strength) + ranges.enhancement[1] * strength)
    translation = round(sign * strength * ranges.translation)
    # Another sense of rotation than DALI's.
    shear = -sign * math.degrees(math.atan(strength * ranges.shear))
    match operation:
        case "translate_x":
            return _moved(image, translate=[translation, 0])
        case "translate_y":
            return _moved(image, translate=[0, translation])
        case "shear_x":
            return _moved(image, shear=[shear, 0.0])
        case "shear_y":
            return _moved(image, shear=[0.0, shear])
        case "rotate":
            return F.rotate(image, sign * strength * ranges.rotation)
        case "brightness":
            return F.adjust_brightness(image, enhanced)
        case "contrast":
            return F.adjust_contrast(image, enhanced)
        case "color":
            return F.adjust_saturation(image, enhanced)
        case "sharpness":
            return F.adjust_sharpness(image, enhanced)
        case "posterize":
            return F.posterize(image, 8 - round(strength * ranges.bits))
        case "solarize":
            return F.solarize(image, 256 * (1 - strength))
        case "equalize":
            return F.equalize(image)
        case "auto_contrast":
            return F.autocontrast(image)
        case "identity":
            return image


def _moved(image: Image.Image, translate: tuple = (0, 0), shear: tuple = (0.0, 0.0)) -> Image.Image:
    return F.affine(image, 0.0, list(translate), 1.0, list(shear), center=[0, 0])
