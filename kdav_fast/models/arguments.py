"""Arguments for the constructor of a library's network: which it knows, and the image size that it must be told."""

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kdav_fast.errors import InputError, one_line

Build = Callable[..., nn.Module]
"""Builds a network, newly initialised, from the constructor's further arguments."""

# What other keys of the config say, and what would make no classifier of RGB images or read files.
_RESERVED = {
    "num_classes": "the data's classes decide it",
    "in_chans": "images are RGB",
    "pretrained": "use the key pretrained",
    "weights": "use the key pretrained",
    "checkpoint_path": "use the key checkpoint",
    "features_only": "it would leave no class scores",
}
_OF_THE_LIBRARY = {
    "cache_dir",
    "device",
    "dtype",
    "exportable",
    "no_jit",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "pretrained_strict",
    "progress",
    "scriptable",
    "weights_backbone",
}
_NOBODY_S = "argument_that_no_network_has"


def sketch(build: Callable[[], nn.Module]) -> nn.Module:
    """The network without memory for its weights; random numbers stay where they are."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (
            NotImplementedError,
            RuntimeError,
        ):  # it reckons its sizes with tensors, as torchvision's RegNets do
            return build().to("meta")


def check_arguments(name: str, build: Build, arguments: dict[str, Any]) -> None:
    """Raise `InputError` that names the first argument that the network's constructor does not take."""
    for key in arguments:
        if key in _RESERVED:
            raise InputError(f"{name} was given the argument '{key}': {_RESERVED[key]}; drop it")
        if key in _OF_THE_LIBRARY:
            raise InputError(
                f"{name} takes no argument '{key}' here: it does not change the network; drop it"
            )
    if not arguments:
        return
    try:
        wanted = sketch(lambda: build(**arguments))
    except Exception as error:
        # As Python puts it, and as timm does.
        unknown = re.search(r"unexpected keyword argument(?:\(s\):)? \[?'(\w+)'", str(error))
        if unknown:
            raise _unknown(name, build, unknown[1]) from None
        raise InputError(
            f"{name} cannot be built with the arguments {arguments} ({one_line(error)}); change or drop them"
        ) from None
    for key in arguments:
        if key not in _parameters(wanted) and _swallowed(build, arguments, key, wanted):
            raise _unknown(name, build, key)


def with_image_size(
    build: Build, arguments: dict[str, Any], key: str, image_size: int | None
) -> dict[str, Any]:
    """The arguments, with the image size under `key` where the network works with no other than it is told."""
    if image_size is None or key in arguments:
        return arguments
    network = sketch(lambda: build(**arguments))
    if key not in _parameters(network) or _takes(network, image_size):
        return arguments
    size = [image_size, image_size] if key == "input_size" else image_size
    try:
        sized = sketch(lambda: build(**arguments, **{key: size}))
    except Exception:  # it cannot be made for this size: the first image tells why
        return arguments
    return arguments | {key: size} if _takes(sized, image_size) else arguments


def _takes(network: nn.Module, image_size: int) -> bool:
    try:
        with torch.no_grad(), torch.device("meta"):
            network.eval()(torch.empty(1, 3, image_size, image_size))
    except Exception:  # an assertion or a shape, as the library puts it
        return False
    return True


def _parameters(network: nn.Module) -> list[str]:
    """Names in the signature of the class and of those it hands the rest to."""
    return [
        name
        for cls in type(network).__mro__
        if cls not in nn.Module.__mro__ and "__init__" in vars(cls)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]


def _swallowed(build: Build, arguments: dict[str, Any], key: str, wanted: nn.Module) -> bool:
    """Whether a constructor that takes any argument has ignored this one: it takes nobody's, and nothing changed."""
    others = {name: value for name, value in arguments.items() if name != key}
    try:
        sketch(lambda: build(**others, **{_NOBODY_S: 1}))
    except Exception:  # it knows what it takes
        return False
    return repr(sketch(lambda: build(**others))) == repr(wanted)


def _unknown(name: str, build: Build, key: str) -> InputError:
    known = [it for it in _parameters(sketch(build)) if it not in _RESERVED and it not in _OF_THE_LIBRARY]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.0)
    return InputError(f"{name} takes no argument '{key}'; the nearest that it takes are {', '.join(near)}")
