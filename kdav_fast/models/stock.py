"""Networks by name, untouched: timm's, torchvision's and the small ones of the distillation literature."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from kdav_fast.errors import InputError
from kdav_fast.models.cifar import CIFAR_NETWORKS
from kdav_fast.models.normalization import Normalization

WIDTHS = (0.125, 16.0)
"""Channel multipliers that leave every small network at least a few channels."""


class Stock(NamedTuple):
    """A network as its library builds it."""

    network: nn.Module
    image_size: int
    """Side of the square image that the network is made for."""
    normalization: Normalization | None
    """What its pretrained weights expect; `None` for new weights."""


def build_stock(name: str, classes: int, *, width: float = 1.0) -> nn.Module:
    """The untouched architecture, newly initialised: an exported student loads into it with `strict=True`.

    Args:
        name: `timm:NAME`, `torchvision:NAME` or `cifar:NAME`.
        classes: K, the width of its output.
        width: channel multiplier; `cifar:` only.

    Raises:
        InputError: unknown name, or a width or number of classes it cannot have.
    """
    return find_stock(name, classes, width=width).network


def find_stock(name: str, classes: int, *, width: float = 1.0, pretrained: bool = False) -> Stock:
    """As `build_stock`, with what belongs to the network; `pretrained` loads the library's own weights.

    timm makes a new classifier where its weights have another number of classes; torchvision keeps theirs.
    """
    family, separator, network = name.partition(":")
    if not separator or family not in _FAMILIES:
        raise InputError(f"unknown model '{name}'; {_families_for(network or family)}")
    if classes < 1:
        raise InputError(f"{name} was asked for {classes} classes; give 1 or more")
    if family != "cifar" and width != 1:
        raise InputError(f"{name} was given width {width:g}; only cifar: networks have one, leave it at 1")
    return _FAMILIES[family](name, network, classes, width, pretrained)


def _timm(name: str, network: str, classes: int, width: float, pretrained: bool) -> Stock:
    import timm  # here and not above: each library takes seconds, and a run needs one of them or none

    architecture, _, tag = network.partition(".")
    if not timm.is_model(architecture):
        raise InputError(_unknown(name, "timm", network, timm.list_models()))
    if tag and network not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise InputError(_unknown(name, "timm", network, tagged))
    try:
        built = timm.create_model(network, pretrained=pretrained, num_classes=classes)
    except Exception as error:
        if pretrained:
            raise _no_weights(name, error) from error
        raise
    config = built.pretrained_cfg
    normalization = Normalization(tuple(config["mean"]), tuple(config["std"])) if pretrained else None
    return Stock(built, config["input_size"][-1], normalization)


def _torchvision(name: str, network: str, classes: int, width: float, pretrained: bool) -> Stock:
    import torchvision

    # Classification only: the library's detectors and video networks have other registries.
    known = torchvision.models.list_models(module=torchvision.models)
    if network not in known:
        raise InputError(_unknown(name, "torchvision", network, known))
    if not pretrained:
        return Stock(torchvision.models.get_model(network, num_classes=classes), 224, None)
    weights = torchvision.models.get_model_weights(network).DEFAULT
    try:
        built = torchvision.models.get_model(network, weights=weights)
    except Exception as error:
        raise _no_weights(name, error) from error
    transforms = weights.transforms()
    # The crop, not the resize before it, is what the network sees.
    image_size = transforms.crop_size[0]
    return Stock(built, image_size, Normalization(tuple(transforms.mean), tuple(transforms.std)))


def _cifar(name: str, network: str, classes: int, width: float, pretrained: bool) -> Stock:
    if network not in CIFAR_NETWORKS:
        raise InputError(_unknown(name, "cifar", network, CIFAR_NETWORKS))
    if pretrained:
        raise InputError(f"{name} has no pretrained weights; give a checkpoint or drop pretrained")
    low, high = WIDTHS
    if not low <= width <= high:
        raise InputError(f"{name} was given width {width:g}; give {low:g} to {high:g}, 1 as published")
    return Stock(CIFAR_NETWORKS[network](classes, width), 32, None)


_FAMILIES = {"timm": _timm, "torchvision": _torchvision, "cifar": _cifar}


def _unknown(name: str, family: str, network: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(network, list(known), n=3, cutoff=0.0)
    if not near:  # a tag behind an architecture that has no weights at all
        return f"unknown model '{name}'; no pretrained weights of it are known, drop what follows the dot"
    return f"unknown model '{name}'; the nearest known ones are {', '.join(f'{family}:{it}' for it in near)}"


def _families_for(network: str) -> str:
    import timm
    import torchvision

    libraries = {
        "timm": timm.list_models(),
        "torchvision": torchvision.models.list_models(module=torchvision.models),
        "cifar": list(CIFAR_NETWORKS),
    }
    near = [
        f"{family}:{entry}"
        for family, known in libraries.items()
        for entry in difflib.get_close_matches(network, known, n=1)
    ]
    meant = f"; perhaps {', '.join(near)}" if near else ""
    return f"give timm:NAME, torchvision:NAME or cifar:NAME{meant}"


def _no_weights(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{name}: its pretrained weights cannot be had ({reason}); download them where there is a network, "
        "or give a checkpoint"
    )
