"""Networks by name, untouched: timm's, torchvision's and the small ones of the distillation literature."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdav_fast.errors import InputError, one_line
from kdav_fast.models.arguments import check_arguments, sketch, with_image_size
from kdav_fast.models.cifar import CIFAR_NETWORKS
from kdav_fast.models.normalization import Normalization
from kdav_fast.models.resampling import timm_resampling, torchvision_resampling

WIDTHS = (0.125, 16.0)
"""Channel multipliers that leave every small network at least a few channels."""


class Facts(NamedTuple):
    """What belongs to a network besides its layers."""

    image_size: int
    """Side of the square image that the network is made for."""
    arguments: dict[str, Any]
    """With which its library's constructor makes it; whoever rebuilds it needs them."""
    normalization: Normalization | None = None
    """What its pretrained weights expect; `None` for new weights."""
    pretrained_classes: int | None = None
    """Classes that its pretrained weights know, 0 for none; `None` for new weights."""
    left_out: tuple[str, ...] = ()
    """Prefixes of the tensors of auxiliary heads, which the library has and this network lacks."""
    resample: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None
    """Fits weights made for another image size to the network, where its library can."""


class Stock(NamedTuple):
    """A network as its library builds it."""

    network: nn.Module
    facts: Facts


class _Wanted(NamedTuple):
    """What `find_stock` was asked for."""

    name: str
    network: str
    """The name in its library."""
    classes: int
    width: float
    pretrained: bool
    image_size: int | None
    arguments: dict[str, Any]


def build_stock(
    name: str, classes: int, *, width: float = 1.0, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """The untouched architecture, newly initialised: an exported student loads into it with `strict=True`.

    Args:
        name: `timm:NAME`, `torchvision:NAME` or `cifar:NAME`.
        classes: K, the width of its output.
        width: channel multiplier; `cifar:` only.
        arguments: further ones for its library's constructor, as in the card of an exported student.

    Raises:
        InputError: unknown name, or a width, number of classes or argument it cannot have.
    """
    return find_stock(name, classes, width=width, arguments=arguments).network


def find_stock(
    name: str,
    classes: int,
    *,
    width: float = 1.0,
    pretrained: bool = False,
    image_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Stock:
    """As `build_stock`, with what belongs to the network.

    Args:
        pretrained: load the library's own weights. Where they know another number of classes, the head is new.
        image_size: side of the images it will see: a network of one fixed size is built for this one.
    """
    family, separator, network = name.partition(":")
    if not separator or family not in _FAMILIES:
        raise InputError(f"unknown model '{name}'; {_families_for(network or family)}")
    if classes < 1:
        raise InputError(f"{name} was asked for {classes} classes; give 1 or more")
    if family != "cifar" and width != 1:
        raise InputError(f"{name} was given width {width:g}; only cifar: networks have one, leave it at 1")
    return _FAMILIES[family](
        _Wanted(name, network, classes, width, pretrained, image_size, dict(arguments or {}))
    )


def head_tensors(
    name: str, *, width: float = 1.0, arguments: Mapping[str, Any] | None = None
) -> frozenset[str]:
    """Names of the tensors whose shape depends on the number of classes."""
    few, more = (
        sketch(partial(build_stock, name, classes, width=width, arguments=arguments)).state_dict()
        for classes in (2, 3)
    )
    return frozenset(key for key in few if few[key].shape != more[key].shape)


def _timm(it: _Wanted) -> Stock:
    import timm  # here and not above: each library takes seconds, and a run needs one of them or none

    architecture, _, tag = it.network.partition(".")
    if not timm.is_model(architecture):
        raise InputError(_unknown(it.name, "timm", it.network, timm.list_models()))
    if tag and it.network not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise InputError(_unknown(it.name, "timm", it.network, tagged))
    build = partial(timm.create_model, it.network, num_classes=it.classes)
    check_arguments(it.name, build, it.arguments)
    arguments = with_image_size(build, it.arguments, "img_size", it.image_size)
    try:
        built = build(pretrained=it.pretrained, **arguments)
    except Exception as error:
        if it.pretrained:
            raise _no_weights(it.name, error) from error
        raise
    config = built.pretrained_cfg
    facts = Facts(_side(arguments.get("img_size", config["input_size"])), arguments)
    if it.pretrained:
        normalization = Normalization(tuple(config["mean"]), tuple(config["std"]))
        facts = facts._replace(normalization=normalization, pretrained_classes=config["num_classes"])
    return Stock(built, facts._replace(resample=timm_resampling(built)))


# Heads that only training uses, on layers in the middle: without them the network answers as it does with them.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def _torchvision(it: _Wanted) -> Stock:
    import torchvision

    # Classification only: the library's detectors and video networks have other registries.
    known = torchvision.models.list_models(module=torchvision.models)
    if it.network not in known:
        raise InputError(_unknown(it.name, "torchvision", it.network, known))
    plain = partial(torchvision.models.get_model, it.network)
    auxiliary = _AUXILIARY.get(it.network, ())
    if auxiliary:
        plain = partial(plain, init_weights=True)  # as without, but for a warning
    build = partial(plain, num_classes=it.classes)
    check_arguments(it.name, build, it.arguments)
    arguments = ({"aux_logits": False} if auxiliary else {}) | it.arguments
    facts = Facts(224, arguments, left_out=() if arguments.get("aux_logits") else auxiliary)
    donor = None
    if it.pretrained:
        weights = torchvision.models.get_model_weights(it.network).DEFAULT
        try:
            donor = torchvision.models.get_model(it.network, weights=weights)
        except Exception as error:
            raise _no_weights(it.name, error) from error
        transforms = weights.transforms()
        facts = facts._replace(
            # The crop, not the resize before it, is what the network sees.
            image_size=transforms.crop_size[0],
            normalization=Normalization(tuple(transforms.mean), tuple(transforms.std)),
            pretrained_classes=len(weights.meta["categories"]),
        )
        if auxiliary:  # its weights came from a library with other pixels
            arguments = {"transform_input": donor.transform_input} | arguments
    # Vision transformers call it so; MaxViT wants height and width.
    key = "input_size" if it.network.startswith("maxvit") else "image_size"
    own = None if donor is None else facts.image_size
    arguments = with_image_size(build, arguments, key, it.image_size or own)
    facts = facts._replace(
        image_size=_side(arguments.get(key, facts.image_size)),
        arguments=arguments,
        resample=torchvision_resampling(it.network),
    )
    network = build(**arguments)
    if donor is not None:
        _copy_weights(it, donor, network, facts)
    return Stock(network, facts)


def _copy_weights(it: _Wanted, donor: nn.Module, network: nn.Module, facts: Facts) -> None:
    """The donor's weights, but for a head of another number of classes."""
    state = {
        name: tensor for name, tensor in donor.state_dict().items() if not name.startswith(facts.left_out)
    }
    if facts.resample is not None:
        state = facts.resample(state, network)
    fresh = network.state_dict()
    if it.classes != facts.pretrained_classes:
        state |= {name: fresh[name] for name in head_tensors(it.name, arguments=facts.arguments)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{it.name}: its pretrained weights do not fit it with arguments {facts.arguments} "
            f"({one_line(error)}); drop the arguments that change its layers"
        ) from None


def _cifar(it: _Wanted) -> Stock:
    if it.network not in CIFAR_NETWORKS:
        raise InputError(_unknown(it.name, "cifar", it.network, CIFAR_NETWORKS))
    if it.pretrained:
        raise InputError(f"{it.name} has no pretrained weights; give a checkpoint or drop pretrained")
    if it.arguments:
        raise InputError(
            f"{it.name} takes no argument '{next(iter(it.arguments))}'; cifar: networks have a width only, "
            "leave arguments empty"
        )
    low, high = WIDTHS
    if not low <= it.width <= high:
        raise InputError(f"{it.name} was given width {it.width:g}; give {low:g} to {high:g}, 1 as published")
    return Stock(CIFAR_NETWORKS[it.network](it.classes, it.width), Facts(32, {}))


_FAMILIES = {"timm": _timm, "torchvision": _torchvision, "cifar": _cifar}


def _side(size: Any) -> int:
    """Of an image size given as a number, as height and width, or with channels before them."""
    return size if isinstance(size, int) else size[-1]


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
    return InputError(
        f"{name}: its pretrained weights cannot be had ({one_line(error)}); download them where there is a network, "
        "or give a checkpoint"
    )
