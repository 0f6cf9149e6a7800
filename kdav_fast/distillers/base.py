"""The interface of every method: what it asks of a run, and what it is given. The training loop knows only this.

A method is one file of this folder, named as `distiller.name` calls it: a pure function first, then a `Distiller` with
its `Config`, and `METHOD`, which names that class.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import Order, Shuffled
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import FoldableHead

if TYPE_CHECKING:
    from kdav_fast.distillers.phases import Phase


class Shapes(NamedTuple):
    """What is known of a network before training."""

    name: str
    features: int
    """Width of its penultimate features; 0 where it has none."""
    stages: tuple[tuple[int, int, int], ...] = ()
    """C, H, W of each feature map, shallow to deep, where the method asks for them."""


class Facts(NamedTuple):
    """What is known before training."""

    student: Shapes
    teacher: Shapes | None
    """None without a teacher."""
    teacher_classifier: nn.Linear | None
    """The teacher's last layer, with whole weights; None where it has no such layer."""
    labels: np.ndarray
    """N class ids of the training images, in their order: what `Batch.index` counts."""
    classes: int
    """K."""
    label_smoothing: float
    """For terms that use labels."""
    seed: int
    """Of the run, for what a method draws at each step; torch's generator already follows from it here."""
    dtype: torch.dtype
    """In which large products are taken and embeddings remembered; sums are in float32."""
    device: torch.device


class Progress(NamedTuple):
    """How far the run is, at the step about to be taken."""

    step: int
    """Optimizer steps taken."""
    steps: int
    """Optimizer steps of the whole run."""
    epoch: float
    """Passes over the training set behind it."""
    epochs: float
    """Passes of the whole run."""


class Learned(NamedTuple):
    """A module that is trained beside the student, and saved, but never exported."""

    module: nn.Module
    lr_factor: float = 1.0
    """Of `optimizer.lr` at each step."""
    weight_decay: float | None = None
    """None: the student's."""


class Losses(NamedTuple):
    """The loss of a batch and its named parts, each a mean over valid rows."""

    total: Tensor
    """Scalar; the only differentiable one."""
    parts: dict[str, Tensor]
    """Detached scalars for the log."""


class Distiller(nn.Module):
    """A method.

    What it remembers is in its buffers, which are registered whole in `__init__`, saved with every checkpoint and must
    be the same on all ranks after every step. What is trained is in `learned`, or in the head, which the student takes
    over: a parameter registered here is an error.

    Args:
        config: its section of the config.
        facts: what is known before training.

    Raises:
        InputError: it does not go with these facts.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    order: Order = Shuffled()
    """Which training images it sees together."""

    def __init__(self, config: MethodConfig, facts: Facts) -> None:
        super().__init__()

    def head(self) -> FoldableHead | None:
        """Takes the place of the student's classifier, and is exported folded into one; None: the student keeps it.

        Under a head `student.logits` carry no gradient to the embedding: a loss on scores takes
        `head.classify(student.embedding)`.
        """
        return None

    def learned(self) -> dict[str, Learned]:
        """What is trained beside the student, by name."""
        return {}

    def phases(self) -> Sequence["Phase"]:
        """What comes before distillation, in order."""
        return ()

    def remarks(self) -> Sequence[str]:
        """Lines that the user shall read before the run begins."""
        return ()

    def before_student(self, teacher: Outputs | None, batch: Batch) -> tuple:
        """What need not wait for the student: called before its forward pass, as `forward` is.

        What is sent to the other ranks here is under way while the student answers.

        Returns:
            Further arguments of `forward`.
        """
        return ()

    def meet(self, student: nn.Module) -> None:
        """Called once, before the run begins or goes on, for a method that keeps a copy of the student, in buffers.

        Args:
            student: in its training form; from B x 3 x S x S images to `Outputs`.
        """

    def after_step(self, student: nn.Module, learned: dict[str, nn.Module]) -> None:
        """Called after each step of the optimizer, for running averages: all weights are whole then.

        Of a step that turns out not to be finite, what it does to buffers is undone.
        """

    @abstractmethod
    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
        *begun: Any,
    ) -> Losses:
        """The loss of one micro-batch.

        Called inside the forward pass of what the optimizer trains, so that `learned`, and parameters of theirs, may
        be used in any way at every ZeRO stage. Autocast is off here, and on inside the modules of `learned`.

        Args:
            student: answers to `batch.images`; stages in the networks' dtype, all else float32.
            teacher: the same of the teacher, without gradient; None without one.
            batch: what is known of the images.
            learned: the modules of `learned()`, by name.
            progress: how far the run is.
            begun: what `before_student` gave for this batch; a method without it need not name this.
        """

    def lend(self, name: str, module: nn.Module) -> None:
        """Keep a module that the student or `learned` takes over, which train, shard and save it: unregistered here."""
        object.__setattr__(self, name, module)


def mean_over_valid(rows: Tensor, valid: Tensor) -> Tensor:
    """Mean of the B values whose row is valid; 0 if none is."""
    return torch.where(valid, rows, 0.0).sum() / valid.sum().clamp(min=1)


def sum_of_parts(parts: dict[str, tuple[float, Tensor]], valid: Tensor) -> Losses:
    """Of several parts, each by its name, a weight and B rows: the sum of weight times mean over the valid rows."""
    means = {name: mean_over_valid(rows, valid) for name, (_, rows) in parts.items()}
    total = sum(weight * means[name] for name, (weight, _) in parts.items())
    return Losses(total, {name: mean.detach() for name, mean in means.items()})


def widened(tensor: Tensor) -> Tensor:
    """Half precision to float32; other tensors as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def label_loss(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Cross-entropy of each row, B, with the labels or, where there are some, the mixed shares."""
    truth = batch.labels if batch.mixed is None else batch.mixed
    return F.cross_entropy(widened(logits), truth, reduction="none", label_smoothing=label_smoothing)
