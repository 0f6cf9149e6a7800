"""The moving average of the student, which is evaluated and saved in its place."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn

from kdav_fast.student.student import Student


class StudentAverage(nn.Module):
    """Exponential moving average of a student's parameters and buffers.

    The first step makes it the student; each later one, e <- e + (1 - decay) (w - e). Counters are the student's. The
    weight of a step lies on the device, so that nothing waits for whether it was taken.

    Args:
        student: whose; copied.
        decay: from 0 to below 1.
    """

    def __init__(self, student: Student, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(student)
        self._decay = decay
        device = next(student.parameters()).device
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, student: Student, taken: Tensor) -> None:
        """After a step.

        Args:
            student: with whole weights.
            taken: whether the step was: scalar, boolean. If not, nothing changes.
        """
        weight = torch.where(self.n_averaged == 0, 1.0, 1.0 - self._decay) * taken
        self.n_averaged += taken
        groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, theirs in zip(_state(self.module), _state(student), strict=True):
            for known, tensor in zip(groups.setdefault(mine.dtype, ([], [])), (mine, theirs), strict=True):
                known.append(tensor)
        for dtype, (mine, theirs) in groups.items():
            if not dtype.is_floating_point:
                torch._foreach_copy_(mine, theirs)
                continue
            # Not `_foreach_lerp_`, which takes its weight from the host.
            change = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(change, weight.to(dtype))
            torch._foreach_add_(mine, change)


def _state(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())
