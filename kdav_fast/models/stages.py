"""Feature maps of any network, shallow to deep: where they are, and how they are taken out of a forward pass."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from kdav_fast.errors import InputError
from kdav_fast.models.trace import Seen, Trace, first_tensor, inputs_of, is_layer, trace

_DEPTHS = 4
"""Maps of a network whose resolution never changes, evenly spread: one in each quarter of its blocks."""
_MOST_PREFIX = 16
"""Tokens beside those of the image: of class, of distillation, registers."""
_REDUCTION = 1.5
"""Of H and W, from one resolution to the next: at least this."""
_ACTIVATIONS = frozenset(
    ["Relu", "Hardtanh", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Mish", "Hardswish", "Tanh"]
)
"""Those called as functions, by the steps that autograd records for them."""


class Layout(NamedTuple):
    """How a network holds the maps of B images."""

    channels_last: bool = False
    """B x H x W x C, as Swin does; else B x C x H x W."""
    prefix: int | None = None
    """Of B x N x C tokens: how many of them, first ones, are not of the image; None for maps."""

    def to_map(self, tensor: Tensor) -> Tensor:
        """A view of B x C x H x W; tokens are those of square images."""
        if self.prefix is not None:
            tokens = tensor[:, self.prefix :]
            side = math.isqrt(tokens.shape[1])
            return tokens.transpose(1, 2).unflatten(2, (side, side))
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor


class Stage(NamedTuple):
    """A feature map, and where a pass shows it."""

    after: Seen
    before: Seen
    """Ahead of its last activation; the map itself where it ends in none."""
    layout: Layout


class Stages:
    """Takes a network's maps out of its passes.

    Hooks on the network: they are copied with it, and hold tensors from `begin` to `take` only.

    Args:
        network: without its head.
        stages: of `find_stages`.
        preactivations: whether the maps before their last activation are taken too.
    """

    def __init__(self, network: nn.Module, stages: list[Stage], preactivations: bool) -> None:
        self.layouts = [stage.layout for stage in stages]
        places = [stage.after for stage in stages]
        if preactivations:
            places += [stage.before for stage in stages]
        self._watching = False
        self._calls = [0] * len(places)
        self._found: list[Tensor | None] = [None] * len(places)
        for index, place in enumerate(places):
            module, hook = network.get_submodule(place.path), _Hook(self, index, place)
            if place.into:
                module.register_forward_pre_hook(hook)
            else:
                module.register_forward_hook(hook)

    def begin(self) -> None:
        """Before a pass."""
        self._watching = True
        self._calls = [0] * len(self._calls)

    def take(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """After a pass: the maps, and the maps before their last activation; each B x C x H x W."""
        found, self._found = self._found, [None] * len(self._found)
        self._watching = False
        if any(tensor is None for tensor in found):
            raise RuntimeError(
                "a pass showed no feature maps: it ran code that torch.compile had made of a network without them; set "
                "torch._dynamo.config.skip_nnmodule_hook_guards = False before the first network is compiled"
            )
        count = len(self.layouts)
        maps = [layout.to_map(tensor) for layout, tensor in zip(self.layouts * 2, found, strict=False)]
        return tuple(maps[:count]), tuple(maps[count:])

    def see(self, index: int, call: int, copied: bool, given: Any) -> None:
        """What a hook is given; only the wanted call of its module in a pass counts."""
        if not self._watching:  # a pass of someone else, or repeated in the backward pass
            return
        if self._calls[index] == call:
            tensor = first_tensor(given)
            self._found[index] = tensor.clone() if copied else tensor
        self._calls[index] += 1


class _Hook:
    """On a module; an object and no closure, so that a copy of the network hands its maps to the copy of `Stages`."""

    def __init__(self, stages: Stages, index: int, place: Seen) -> None:
        self.stages, self.index, self.call, self.copied = stages, index, place.call, place.overwritten

    def __call__(self, module: nn.Module, *seen: Any) -> None:
        self.stages.see(self.index, self.call, self.copied, seen[-1])


def find_stages(
    network: nn.Module, name: str, image: Tensor, last: str | None, preactivations: bool
) -> list[Stage]:
    """The last feature map at each resolution, shallow to deep, found in a trial pass.

    Where the library says itself which modules give them (timm's `feature_info`), those are meant. Else a map is what
    all of the answer is computed through, so no branch of a block, and of these the last output of a block at each
    resolution, or, ahead of the first block, the last that any module sees. A normalisation after a block belongs to
    what follows, and a single 1x1 convolution that widens the last map (MobileNetV2) to the classifier. So a `cifar:`
    ResNet gives the outputs of its three groups: its stem has the resolution of the first, and published methods take
    these. Networks of one resolution, as vision transformers, give maps at four evenly spread depths.

    Args:
        network: without its head, in evaluation mode.
        name: for messages.
        image: 1 x 3 x S x S.
        last: path of the layer that makes the class scores, where it is still in the network.
        preactivations: whether the maps before their last activation are wanted.

    Raises:
        InputError: it has no such maps, or they cannot be seen.
    """
    seen = trace(network, image)
    chosen = _told(network, seen) or _found(network, seen, last)
    if not chosen or not _confirmed(network, image, chosen):
        raise InputError(
            f"{name} has no feature maps that can be told from its layers; choose a convolutional network or vision "
            "transformer, such as timm:resnet18, or a method on class scores, such as distiller.name=kd"
        )
    before = [_before(network, name, seen, each) for each in chosen] if preactivations else chosen
    layouts = [_layout(network, each) for each in chosen]
    return [Stage(*places) for places in zip(chosen, before, layouts, strict=True)]


def _told(network: nn.Module, seen: Trace) -> list[Seen]:
    """As timm's `feature_info` says; none where it does not name modules that give one map each."""
    info = getattr(network, "feature_info", None) or []
    info = getattr(info, "info", info)
    outputs = {each.path: each for each in seen.seen if not each.into and _layout(network, each) is not None}
    paths = [each.get("module") for each in info]
    if len(set(paths)) < len(paths) or not outputs.keys() >= set(paths):
        return []
    return _last_of_each([(each["reduction"], outputs[each["module"]]) for each in info])


def _found(network: nn.Module, seen: Trace, last: str | None) -> list[Seen]:
    """As the way that the answer is computed on shows it."""
    limit = next((each.layers for each in seen.seen if each.path == last), math.inf)
    maps: list[tuple[int, Seen]] = []
    blocks = layers = 0  # how many, and by when
    for node in seen.path:
        shown = _outermost(seen, node)
        if shown is None or not 0 < shown.layers < limit or not (side := _side(network, shown)):
            continue
        block = shown.layers > layers and any(each.path in seen.blocks for each in _outputs(seen, node))
        if not (block or (blocks == 0 and side > 1)) or (maps and side > maps[-1][0]):
            continue
        if block:
            blocks, layers = blocks + 1, shown.layers
        maps.append((side, shown))
    maps = [each for each in maps if not _on_the_way_down(network, seen, maps, *each)]
    if blocks > 1 and len(maps) > 1 and _widens(network, seen, maps[-2][1], maps[-1][1]):
        maps.pop()
    levels: list[tuple[int, Seen]] = []
    for index, (side, shown) in enumerate(maps):
        # Unpadded convolutions take off a pixel or two (Inception), which is no other resolution.
        lower = index > 0 and maps[index - 1][0] >= _REDUCTION * side
        levels.append(((levels[-1][0] if levels else 0) + lower, shown))
    return _last_of_each(levels) if blocks or len(dict(levels)) > 1 else []


def _confirmed(network: nn.Module, image: Tensor, chosen: list[Seen]) -> bool:
    """Whether maps are among those that the library hands out itself, if it does: Hiera's tokens are shuffled."""
    if not hasattr(network, "forward_intermediates"):
        return True
    with torch.no_grad():
        own = network.forward_intermediates(image, intermediates_only=True)
    maps = [_layout(network, each).to_map(each.tensor) for each in chosen if not each.overwritten]
    return all(
        any(one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3) for other in own)
        for one in maps
    )


def _last_of_each(maps: list[tuple[int, Seen]]) -> list[Seen]:
    """Of maps with their resolutions the last of each; of one resolution, evenly spread ones."""
    if len({resolution for resolution, _ in maps}) > 1:
        return list(dict(maps).values())
    count = min(len(maps), _DEPTHS)
    return [maps[len(maps) * (index + 1) // count - 1][1] for index in range(count)]


def _on_the_way_down(
    network: nn.Module, seen: Trace, maps: list[tuple[int, Seen]], side: int, shown: Seen
) -> bool:
    """Whether a map lies in a block that starts at its resolution and ends at the next, as MobileNet's expansions."""
    names = shown.path.split(".")
    for path in (".".join(names[:depth]) for depth in range(1, len(names))):
        ends = [each for each in seen.seen if each.path == path]
        inside = {each_side for each_side, each in maps if each.path.startswith(f"{path}.")}
        if (
            ends  # a list of modules has none
            and not isinstance(network.get_submodule(path), nn.Sequential)
            and any(each.node is ends[0].node and each_side == side for each_side, each in maps)
            and (end := _side(network, ends[-1])) < side
            and inside <= {side, end}
        ):
            return True
    return False


def _side(network: nn.Module, seen: Seen) -> int:
    """H and W of a map of a square image; 0 where a tensor holds none."""
    layout = _layout(network, seen)
    return 0 if layout is None else layout.to_map(seen.tensor).shape[-1]


def _layout(network: nn.Module, seen: Seen) -> Layout | None:
    """How a tensor of one square image holds a map; None where it holds none."""
    shape = seen.tensor.shape
    if shape[0] != 1:  # windows
        return None
    if len(shape) == 4:
        first, last = shape[2] == shape[3], shape[1] == shape[2]
        if first and last:
            last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        return Layout(channels_last=last) if first or last else None
    if len(shape) != 3:
        return None
    # Tokens are made of a convolution's pixels, or are those of a stage that merged some.
    made = max((pixels for pixels in seen.pixels if 0 <= shape[1] - pixels <= _MOST_PREFIX), default=1)
    tokens = shape[1] if made == 1 and _is_square(shape[1]) else made
    return Layout(prefix=shape[1] - tokens) if _is_square(tokens) and tokens <= shape[1] else None


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _outputs(seen: Trace, node: Node) -> list[Seen]:
    """Where what a step made came out of modules, from the inside out."""
    return [each for each in seen.seen if each.node is node and not each.into]


def _outermost(seen: Trace, node: Node) -> Seen | None:
    """Where what a step made is seen best: at the end of the whole block that it ends, else on the way into the next.

    What follows the block, as dropout does, may hand the same on in evaluation mode alone.
    """
    if "Split" in node.name() or "Unbind" in node.name():  # several tensors, each a part
        return None
    outputs = _outputs(seen, node)
    if not outputs:
        return next((each for each in seen.seen if each.node is node), None)
    inner = outputs[0].path + "."
    return [each for each in outputs if inner.startswith(f"{each.path}.") or not each.path][-1]


def _widens(network: nn.Module, seen: Trace, before: Seen, after: Seen) -> bool:
    """Whether one 1x1 convolution to more channels is all between two maps."""
    between = [
        module
        for each in seen.seen
        if each.into and before.layers < each.layers <= after.layers
        if is_layer(module := network.get_submodule(each.path))
    ]
    if len(between) != 1 or not isinstance(between[0], nn.Conv2d):
        return False
    return between[0].kernel_size == (1, 1) and between[0].out_channels > between[0].in_channels


def _before(network: nn.Module, name: str, seen: Trace, after: Seen) -> Seen:
    """Where a map is seen ahead of its last activation; where it is seen itself if it ends in none.

    Raises:
        InputError: the activation is no module of its own, nor anything before it that shows what it is given.
    """
    outputs = _outputs(seen, after.node)
    if outputs and _is_activation(network.get_submodule(outputs[0].path)):
        call = outputs[0].path, outputs[0].call
        return next(each for each in seen.seen if each.into and (each.path, each.call) == call)
    if after.node.name().removesuffix("Backward0").rstrip("_") not in _ACTIVATIONS:
        return after
    source = next(inputs_of(after.node))
    shown = _outermost(seen, source)
    if shown is None:
        raise InputError(
            f"{name} calls an activation as a function, so that its feature maps before it cannot be seen; choose a "
            "network whose activations are modules, such as timm:resnet18, or a method that wants none of these maps"
        )
    return shown


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__.startswith(
        ("torch.nn.modules.activation", "timm.layers.activations")
    ) and not any(module.children())
