"""What a network returns to the training loop and to a distiller."""

from typing import NamedTuple

from torch import Tensor


class Extraction(NamedTuple):
    """What a network makes of B images ahead of its classifier."""

    features: Tensor
    """Penultimate features, B x width."""
    scores: Tensor | None
    """Class scores, B x K, of a network that keeps its head to itself; None where a classifier follows."""
    stages: tuple[Tensor, ...]
    """As in `Outputs`."""
    preactivations: tuple[Tensor, ...]
    """As in `Outputs`."""


class Outputs(NamedTuple):
    """A network's answer for a batch of B images (V*B of V views).

    A named tuple, not a dataclass: DeepSpeed walks tuples to find the tensors it hooks.
    """

    features: Tensor
    """Penultimate features, B x width: what the last linear layer sees."""
    logits: Tensor
    """Class scores, B x K."""
    embedding: Tensor | None = None
    """Features in the teacher's space, B x d, where the student has an embedding head."""
    stages: tuple[Tensor, ...] = ()
    """Feature maps, each B x C x H x W, shallow to deep, where a method asks for them; in the networks' dtype."""
    preactivations: tuple[Tensor, ...] = ()
    """The same maps before their last activation, where a method asks for them."""
    head_map: Tensor | None = None
    """What a head that works on the last map makes of it beside the embedding, in the networks' dtype."""


def best_classes(logits: Tensor, count: int = 5) -> Tensor:
    """Of B x K logits the classes that score highest, B x count (or x K), best first; -1 in rows not finite."""
    best = logits.topk(min(count, logits.shape[1]), dim=1).indices
    return best.where(logits.isfinite().all(1, keepdim=True), -1)
