"""What the optimizer, ZeRO and the checkpoints see as one module: the student, what is learned beside it, the loss."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdav_fast.data.batch import Batch
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.student import Student

Clock = Callable[[str], AbstractContextManager[object]]


class Answer(NamedTuple):
    """What a micro-batch comes to. A named tuple: DeepSpeed walks tuples to find the tensors it hooks."""

    total: Tensor
    """The loss: scalar, the only one with a gradient."""
    parts: dict[str, Tensor]
    """Of the loss, by name: detached scalars."""
    logits: Tensor
    """The student's, detached: V*B x K."""


class Trainee(nn.Module):
    """Student and learned modules, whose forward pass takes the loss too.

    So a method may use what is learned in any way: at ZeRO stage 3, weights that are used outside their own module
    come together only inside the forward pass of the module that is wrapped.

    Args:
        student: the network that is evaluated and exported.
        learned: what a method trains beside it, by name.
        loss: from student's and teacher's answers, the batch, the learned modules and the run's progress, to what has
            `total` and `parts`; its own state is no part of this module.
        dtype: autocast dtype of the learned modules; None for float32.
        before: called before the student, with the teacher's answers and the batch: gives further arguments of `loss`.
    """

    def __init__(
        self,
        student: Student,
        learned: dict[str, nn.Module],
        loss: Callable[..., object],
        device: torch.device,
        dtype: torch.dtype | None,
        before: Callable[[Outputs | None, Batch], tuple] = lambda teacher, batch: (),
    ) -> None:
        super().__init__()
        self.student, self.learned = student, nn.ModuleDict(learned)
        object.__setattr__(self, "_loss", loss)
        self._before, self._device = before, device.type
        for module in _called(self.learned):
            # The loss is taken in float32; a convolution in it need not be.
            autocast = torch.autocast(self._device, dtype, enabled=dtype is not None)
            module.forward = autocast(module.forward)

    def forward(
        self,
        batch: Batch,
        teacher: Outputs | None,
        progress: object,
        clock: Clock = lambda part: nullcontext(),
    ) -> Answer:
        """The loss of a micro-batch; `clock` is entered around "student" and "loss"."""
        with clock("loss"), torch.autocast(self._device, enabled=False):
            begun = self._before(teacher, batch)
        with clock("student"):
            student = self.student(batch.images)
        with clock("loss"), torch.autocast(self._device, enabled=False):
            losses = self._loss(student, teacher, batch, self.learned, progress, *begun)
        return Answer(*_checked(losses), student.logits.detach())


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that a loss calls: of a list or a dictionary, what is in it."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        yield module
        return
    for child in module.children():
        yield from _called(child)


def _checked(losses: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and detached parts; raises `TypeError` for what is no loss, which backward and log would say in riddles."""
    total, parts = getattr(losses, "total", None), getattr(losses, "parts", None)
    if not isinstance(total, Tensor) or not isinstance(parts, dict):
        raise TypeError(f"the distiller's forward gives a {type(losses).__name__}; give Losses(total, parts)")
    if total.dim() or (torch.is_grad_enabled() and not total.requires_grad):
        what = f"has shape {tuple(total.shape)}" if total.dim() else "depends on nothing that is trained"
        raise TypeError(
            f"the distiller's total loss {what}; give a scalar that depends on the student's answers"
        )
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.dim():
            raise TypeError(
                f"the part {name!r} of the distiller's loss is no scalar tensor; give a mean over valid rows"
            )
    return total, {name: part.detach() for name, part in parts.items()}
