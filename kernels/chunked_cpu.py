"""`chunked` on a CPU: per slice, products of torch with elementwise passes in place between them."""

from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 * 2**20


class Sums(NamedTuple):
    """Sums over the memory, each row's under its largest similarity m; student rows s first, then the teacher's t."""

    maximum: Tensor
    """m, 2B."""
    total: Tensor
    """Of exp(s - m) and exp(t - m), 2B."""
    mass: Tensor
    """Of exp(s - m) R, by class; B x K."""
    teacher_mean: Tensor
    """Of exp(t - m) U; B x d."""
    cross: Tensor | None
    """Of exp(t - m) (t - s), B; None where it is to be taken from the teacher's mean."""


def bytes_per_row(
    batch: int, width: int, classes: int, dtype: torch.dtype, memory: Tensor, posterior: Tensor
) -> int:
    """Workspace that one row of the memory needs: what a slice holds at most at a time, over its rows.

    Two values of `dtype` a batch row (both similarities, or the student's and its factor); a mask; the row of
    U and of R where they have to be converted to `dtype`.
    """
    converted = width * (memory.dtype != dtype)
    converted += classes * (posterior.ndim == 2 and posterior.dtype != dtype)
    return dtype.itemsize * (2 * batch + converted) + 1


def _slice_rows(
    batch: int, classes: int, dtype: torch.dtype, memory: Tensor, posterior: Tensor, most: int
) -> int:
    row = bytes_per_row(batch, memory.shape[1], classes, dtype, memory, posterior)
    return max(1, (most or WORKSPACE_BYTES) // row)


def add_up(
    student_query: Tensor,
    teacher_query: Tensor,
    classes: int,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    workspace_bytes: int,
) -> Sums:
    """The forward pass over all slices.

    Args:
        student_query, teacher_query: kappa * unit embedding, B x d.
        classes: K.
        memory, posterior: U and R.
        filled: how many leading rows are in use; None means all.
        workspace_bytes: most that a slice may take (but never less than one row needs); 0 means the default.
    """
    queries = torch.cat([student_query, teacher_query])
    batch = len(student_query)
    student, teacher = slice(batch), slice(batch, None)
    maximum = torch.full_like(queries[:, 0], -torch.inf)
    total = torch.zeros_like(maximum)
    mass, teacher_mean = queries.new_zeros(batch, classes), torch.zeros_like(teacher_query)
    step = _slice_rows(batch, classes, queries.dtype, memory, posterior, workspace_bytes)

    # A function, so that a slice's tensors are freed before the next one's are made.
    def add(rows: Tensor, posterior: Tensor, valid: Tensor | None) -> Tensor:
        rows = rows.to(queries.dtype)
        similarity = queries @ rows.T
        new = torch.maximum(maximum, _mask(similarity, valid).amax(1))
        rescale = (maximum - new).exp_()
        weights = similarity.sub_(new[:, None]).exp_()
        total.mul_(rescale).add_(weights.sum(1))
        mass.mul_(rescale[student, None])
        if posterior.ndim == 1:
            mass.index_add_(1, posterior, weights[student])
        else:
            mass.addmm_(weights[student], posterior.to(mass.dtype))
        teacher_mean.mul_(rescale[teacher, None]).addmm_(weights[teacher], rows)
        return new

    for start in range(0, len(memory), step):
        part = slice(start, start + step)
        maximum = add(memory[part], posterior[part], None if filled is None else filled - start)
    return Sums(maximum, total, mass, teacher_mean, None)


def add_slopes(
    grad: Tensor,
    student_query: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    log_total: Tensor,
    offset: Tensor,
    minus_ratio: Tensor,
    workspace_bytes: int,
) -> None:
    """The backward pass over all slices: grad += slopes @ U, with the slopes exp(s - log_total) (offset + share).

    Args:
        grad: B x d.
        log_total, offset: B.
        minus_ratio: B x K; share is its product with R's rows.
    The others are as in `add_up`.
    """
    step = _slice_rows(*minus_ratio.shape, grad.dtype, memory, posterior, workspace_bytes)

    def add(rows: Tensor, posterior: Tensor, valid: Tensor | None) -> None:
        if posterior.ndim == 1:
            factor = (offset[:, None] + minus_ratio)[:, posterior]
        else:
            factor = torch.addmm(offset[:, None], minus_ratio, posterior.to(minus_ratio.dtype).T)
        rows = rows.to(grad.dtype)
        log_p_member = torch.addmm(-log_total[:, None], student_query, rows.T)
        grad.addmm_(_mask(log_p_member, valid).exp_().mul_(factor), rows)

    for start in range(0, len(memory), step):
        part = slice(start, start + step)
        add(memory[part], posterior[part], None if filled is None else filled - start)


def _mask(similarity: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return similarity
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    return similarity.masked_fill_(columns >= valid, -torch.inf)
