"""What a method does before distillation begins."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Losses
from kdav_fast.models.outputs import Outputs


@dataclass(frozen=True)
class Measure:
    """One pass over the training images, as the evaluation sees them and in order.

    A signal or a crash in the middle of it costs nothing but the images since the last save.
    """

    name: str
    """What is measured, for the progress bar."""
    see: Callable[[Batch, Outputs | None], None]
    """Takes each batch and the teacher's answers to it, on each rank its own share of the images. Rows that are not
    valid must not count."""
    sums: tuple[Tensor, ...] = ()
    """Buffers that `see` adds to: when the pass is over, they are added up over all ranks."""
    finish: Callable[[], None] = lambda: None
    """Called on every rank when they are."""


@dataclass(frozen=True)
class Fit:
    """Training of `learned` modules by a loss of their own, before the student's training begins.

    On the training images, augmented, in the method's order, by SGD with momentum under a cosine schedule. Every
    rank holds these modules whole meanwhile.
    """

    name: str
    """What is trained, for the progress bar and the log."""
    modules: tuple[str, ...]
    """Names in `learned`. They are in training mode meanwhile."""
    loss: Callable[[Outputs | None, Batch, dict], Losses]
    """From the teacher's answers, the batch and the learned modules."""
    epochs: float
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4


Phase = Measure | Fit
