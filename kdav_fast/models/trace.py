"""What the modules of a network see in a trial pass, and which of it all that follows is computed from."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.conv import _ConvNd


class Seen(NamedTuple):
    """A tensor that went into a module, or came out of it."""

    path: str
    """Of the module."""
    call: int
    """Which of the module's calls in a pass, from 0: torchvision's blocks call one ReLU several times."""
    into: bool
    """Whether it went in."""
    tensor: Tensor
    node: Node
    """The step of the autograd graph that made it; the tensor's own changes where it is overwritten."""
    version: int
    """The tensor's, at that time."""
    layers: int
    """Convolutions and linear layers called so far."""
    pixels: frozenset[int]
    """H * W of all that convolutions have given so far."""

    @property
    def overwritten(self) -> bool:
        """Whether a later step worked in its place."""
        return self.tensor._version != self.version


class Trace(NamedTuple):
    """A trial pass."""

    seen: list[Seen]
    """In order."""
    path: list[Node]
    """The steps through which all of the answer comes, from the images on."""
    blocks: frozenset[str]
    """Modules with a convolution or a linear layer in them."""


def trace(network: nn.Module, images: Tensor) -> Trace:
    """Watch a pass of one image.

    Args:
        network: in evaluation mode; answers with a tensor, or several of which the first counts.
        images: 1 x 3 x H x W.
    """
    seen: list[Seen] = []
    calls: dict[str, int] = {}
    layers = 0
    pixels: frozenset[int] = frozenset()

    def enter(path: str, module: nn.Module, given: Any) -> None:
        nonlocal layers
        layers += is_layer(module)
        calls[path] = calls.get(path, -1) + 1
        record(path, True, given)

    def leave(path: str, module: nn.Module, given: Any) -> None:
        nonlocal pixels
        if isinstance(module, nn.Conv2d):
            pixels |= {given.shape[-2:].numel()}
        record(path, False, given)

    def record(path: str, into: bool, given: Any) -> None:
        tensor = first_tensor(given)
        if tensor is not None and tensor.grad_fn is not None:
            seen.append(
                Seen(path, calls[path], into, tensor, tensor.grad_fn, tensor._version, layers, pixels)
            )

    handles = []
    for path, module in network.named_modules():
        handles += [
            module.register_forward_pre_hook(
                lambda module, inputs, path=path: enter(path, module, inputs), prepend=True
            ),
            module.register_forward_hook(
                lambda module, inputs, output, path=path: leave(path, module, output)
            ),
        ]
    try:
        with torch.enable_grad():
            images = images.detach().requires_grad_().clone()
            answer = first_tensor(network(images))
    finally:
        for handle in handles:
            handle.remove()
    layers_at = [path for path, module in network.named_modules() if is_layer(module)]
    blocks = {path.rsplit(".", depth)[0] for path in layers_at for depth in range(1, path.count(".") + 1)}
    return Trace(seen, _bottlenecks(images.grad_fn, answer.grad_fn), frozenset(blocks))


def first_tensor(given: Any) -> Tensor | None:
    """A tensor, or the first one of several, as a module gets and gives them; None where that is none."""
    while isinstance(given, tuple | list) and given:
        given = given[0]
    return given if isinstance(given, Tensor) else None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear)


def inputs_of(node: Node) -> Iterator[Node]:
    """The steps from which a step computes."""
    return (each for each, _ in node.next_functions if each is not None)


def _bottlenecks(start: Node, end: Node) -> list[Node]:
    """The steps through which every way from `start` to `end` leads, in order; none if there is no way."""
    between = _between(start, end)
    place = {node: index for index, node in enumerate(between)}
    # In topological order, a step is passed by all if no edge leads from before it to behind it.
    furthest = [0] * len(between)
    for node, index in place.items():
        for source in inputs_of(node):
            if source in place:
                furthest[place[source]] = max(furthest[place[source]], index)
    reached, found = 0, []
    for index, node in enumerate(between):
        if reached <= index:
            found.append(node)
        reached = max(reached, furthest[index])
    return found


def _between(start: Node, end: Node) -> list[Node]:
    """The steps on the ways from `start` to `end`, each behind those it computes from."""
    leads: dict[Node, bool] = {start: True}
    order, stack = [start], [(end, False)]
    while stack:
        node, done = stack.pop()
        if done:
            leads[node] = any(leads[each] for each in inputs_of(node))
            if leads[node]:
                order.append(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack += [(each, False) for each in inputs_of(node) if each not in leads]
    return order if leads[end] else []
