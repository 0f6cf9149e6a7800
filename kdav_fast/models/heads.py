"""Where a network's class scores come from: one linear layer, several that are averaged, or something else."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_HEADS = 4
"""Heads that are averaged: two in distilled transformers and in CrossViT."""


class LinearHeads(nn.Module):
    """Linear layers whose mean is the class scores, on the features of all of them side by side.

    Distilled DeiT and LeViT average a head on the class token and one on the distillation token, CrossViT one
    head a branch. A single 1x1 convolution on pooled features (BiT, DLA) is the case of one.

    Args:
        parts: each an `nn.Linear` or a 1x1 `nn.Conv2d`, taken over; all have K outputs.
        shared: all of them see the same features, which then stand there once.
    """

    def __init__(self, parts: list[nn.Module], shared: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.shared = shared
        self.widths = [_size(part)[1] for part in parts]
        self.in_features = self.widths[0] if shared else sum(self.widths)
        self.out_features = _size(parts[0])[0]

    @property
    def bias(self) -> Tensor | None:
        """The first part's; `None` where any part has none."""
        return self.parts[0].bias if all(part.bias is not None for part in self.parts) else None

    def forward(self, features: Tensor) -> Tensor:
        """B x in_features to class scores, B x K."""
        scores = [
            part(each) if isinstance(part, nn.Linear) else part(each[:, :, None, None]).flatten(1)
            for part, each in zip(self.parts, self._shares(features), strict=True)
        ]
        return scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)

    @torch.no_grad()
    def linear(self) -> nn.Linear:
        """The same map as one new layer, B x in_features to B x K."""
        weights = [part.weight.flatten(1) for part in self.parts]
        joined = torch.stack(weights).mean(0) if self.shared else torch.cat(weights, 1) / len(weights)
        biases = [part.bias for part in self.parts if part.bias is not None]
        bias = torch.stack(biases).sum(0) / len(self.parts) if biases else None
        return _linear(joined, bias)

    def part_states(self, linear: nn.Linear) -> list[dict[str, Tensor]]:
        """Weights of the parts with which their mean is `linear`, which has a bias if every part has."""
        if self.shared:
            weights = [linear.weight] * len(self.parts)
        else:
            weights = [weight * len(self.parts) for weight in linear.weight.split(self.widths, dim=1)]
        states = []
        for part, weight in zip(self.parts, weights, strict=True):
            # Copies: a file of weights refuses tensors that share memory.
            states.append({"weight": weight.reshape(part.weight.shape).clone()})
            if linear.bias is not None:
                states[-1]["bias"] = linear.bias.clone()
        return states

    def _shares(self, features: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
        return [features] * len(self.parts) if self.shared else features.split(self.widths, dim=1)


class Place(nn.Module):
    """In a head's place: puts what the head would see into its stretch of the joint features.

    The network's own mean over its heads then joins them, without knowing that they are gone.
    """

    def __init__(self, channels: int, before: int, after: int, heads: int) -> None:
        super().__init__()
        self.padding = (0, 0) * (-channels - 1) + (before, after)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x * self.heads, self.padding)


class Features:
    """A hook that keeps what the last layer sees, pooled: of networks that end in no linear layer."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen = _pooled(module, inputs[0])

    def take(self) -> Tensor:
        """B x width, once a forward pass: a module with a tensor of the graph in it cannot be copied."""
        seen, self.seen = self.seen, None
        return seen


class Ending(NamedTuple):
    """How a network ends."""

    classes: int
    heads: tuple[str, ...]
    """Paths of the linear layers that `classifier` took over; empty where the scores are no linear map of features."""
    classifier: nn.Module | None
    """B x width features to B x K scores: the network's own `nn.Linear`, or `LinearHeads`."""
    last: str | None
    """Path of the layer whose input serves as features where there is no classifier; None where there is no layer."""
    width: int
    """Features; 0 where there are none."""


@torch.no_grad()
def take_heads(network: nn.Module, images: Tensor) -> Ending:
    """Take a network's heads out of it, so that it answers with features, B x width, where it answered with scores.

    Whether layers are the heads is tried out: with random weights in them, the network must give what they give for
    the features. Whatever cannot be split so stays as it is.

    Args:
        network: in evaluation mode.
        images: a batch of its kind.

    Raises:
        ValueError: its answer is not B x K class scores; the message says what it is.
        Exception: whatever the network raises.
    """
    scores, calls = _watch(network, images)
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(1), torch.ones(len(scores)).to(scores)):
        raise ValueError("it answers with probabilities, not with class scores before the softmax")
    names = [path for path, _ in calls]
    layers = {path: network.get_submodule(path) for path in names}
    scoring = [path for path in dict.fromkeys(names) if _size(layers[path])[0] == scores.shape[1]]
    once = [path for path in scoring if names.count(path) == 1]
    inputs = dict(calls)
    latest = once[-_MOST_HEADS:]
    groups = [[path] for path in reversed(latest)] + [latest[-count:] for count in range(2, len(latest) + 1)]
    for heads in groups:
        shared = len(heads) > 1 and all(inputs[path] is inputs[heads[0]] for path in heads)
        if _split(network, heads, shared, images):
            parts = [layers[path] for path in heads]
            single = len(heads) == 1 and isinstance(parts[0], nn.Linear)
            classifier = parts[0] if single else LinearHeads(parts, shared)
            return Ending(scores.shape[1], tuple(heads), classifier, None, classifier.in_features)
    last = scoring[-1] if scoring else names[-1] if names else None
    width = _pooled(layers[last], inputs[last]).shape[1] if last else 0
    return Ending(scores.shape[1], (), None, last, width)


def class_scores(output: Any) -> Tensor:
    """The class scores, B x K, in what a network answers; of several answers, as auxiliary heads give, the first.

    Raises:
        ValueError: there are none.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(f"it answers with a {type(first).__name__}, not with a tensor of class scores")
    if first.dim() != 2:
        shape = " x ".join(map(str, first.shape))
        raise ValueError(f"it answers with {shape} numbers, not with one row of class scores an image")
    return first


def as_linear(classifier: nn.Module) -> nn.Linear:
    """A classifier of `take_heads` as one new linear layer, B x width to B x K."""
    return copy.deepcopy(classifier) if isinstance(classifier, nn.Linear) else classifier.linear()


def _watch(network: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Class scores, and the linear layers and 1x1 convolutions on the way there with what they see, in order."""
    calls: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: calls.append((path, inputs[0])))
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) or _is_pointwise(module)
    ]
    try:
        return class_scores(network(images)), calls
    finally:
        for handle in handles:
            handle.remove()


def _split(network: nn.Module, heads: list[str], shared: bool, images: Tensor) -> bool:
    """Put into the place of each head what lets its input through; False, and nothing done, if that is not a split."""
    own = [network.get_submodule(path) for path in heads]
    generator = torch.Generator(own[0].weight.device).manual_seed(0)
    trial = LinearHeads([_with_random_weights(layer, generator) for layer in own], shared)
    ends = [0]
    for width in trial.widths:
        ends.append(ends[-1] + width)
    through = [
        nn.Identity() if shared or len(own) == 1 else Place(_channels(layer), start, ends[-1] - end, len(own))
        for layer, start, end in zip(own, ends, ends[1:], strict=False)
    ]
    done = False
    try:
        with _in_place(network, heads, list(trial.parts)):
            scores = class_scores(network(images))
        _place(network, heads, through)
        features = class_scores(network(images))
        done = (
            features.shape == (len(images), trial.in_features)
            and _agree(trial(features), scores)
            and not _learned_after(network, heads, own, images)
        )
    except Exception:  # a layer in the middle of the network: whatever follows cannot use its input
        pass
    finally:
        if not done:
            _place(network, heads, own)
    return done


def _learned_after(network: nn.Module, heads: list[str], own: list[nn.Module], images: Tensor) -> bool:
    """Whether parameters act on what the heads say, as EfficientViM's weights of its heads.

    They may start as a plain mean and do not stay one.
    """
    with torch.enable_grad(), _in_place(network, heads, [_Constant(layer) for layer in own]):
        return class_scores(network(images)).requires_grad


class _Constant(nn.Module):
    """In a head's place: the shape of its scores, of which no parameter knows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.classes, self.channels = _size(layer)[0], _channels(layer)

    def forward(self, x: Tensor) -> Tensor:
        scores = x.detach().movedim(self.channels, -1)[..., :1]
        return scores.expand(*scores.shape[:-1], self.classes).movedim(-1, self.channels)


def _agree(given: Tensor, wanted: Tensor) -> bool:
    largest = wanted.abs().max()
    return bool(largest > 0) and bool((given - wanted).abs().max() <= 1e-4 * largest)


@contextmanager
def _in_place(network: nn.Module, paths: list[str], modules: list[nn.Module]) -> Iterator[None]:
    own = [network.get_submodule(path) for path in paths]
    _place(network, paths, modules)
    try:
        yield
    finally:
        _place(network, paths, own)


def _place(network: nn.Module, paths: list[str], modules: list[nn.Module]) -> None:
    for path, module in zip(paths, modules, strict=True):
        network.set_submodule(path, module)


def _with_random_weights(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy: heads may start at zero, of which nothing can be seen."""
    layer = copy.deepcopy(layer)
    for parameter in layer.parameters():
        parameter.normal_(generator=generator)
    return layer


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a 1x1 convolution, which does to every pixel what a linear layer does."""
    return type(module) is nn.Conv2d and (
        module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0) and module.groups == 1
    )


def _size(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs."""
    return layer.weight.shape[0], layer.weight.shape[1]


def _channels(layer: nn.Module) -> int:
    """Dimension of its inputs that holds the features, from the end."""
    return -1 if isinstance(layer, nn.Linear) else -3


def _pooled(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer sees, mean over pixels or tokens: B x width."""
    x = x.movedim(_channels(layer), -1)
    return x.flatten(1, -2).mean(1) if x.dim() > 2 else x


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    layer = layer.to(weight)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer
