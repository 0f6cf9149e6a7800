"""`chunked` on a CPU: per slice, products of torch with elementwise passes in place between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdav_fast.kernels.records import Saved, Settings
from kdav_fast.kernels.reference import compute_dtype

WORKSPACE_BYTES = 64 * 2**20


def query_dtype(memory: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of `Saved.query`, where sums are in `dtype`."""
    return dtype


def forward(
    student: Tensor,
    teacher: Tensor,
    logits: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Saved]:
    """Both divergences of each row, B, and what `backward` needs.

    Arguments are those of `chunked_terms`; `filled` says how many leading rows of the memory are in use, None that
    all are.
    """
    dtype = compute_dtype(student, teacher, logits, memory)
    batch, temperature = len(student), settings.temperature
    query = torch.cat(
        [
            settings.kappa_student * F.normalize(student.to(dtype), dim=1),
            settings.kappa_teacher * F.normalize(teacher.to(dtype), dim=1),
        ]
    )
    q_class = torch.softmax(logits.to(dtype) / temperature, dim=1)
    maximum, total, mass, mean = _add_up(query, q_class, memory, posterior, filled, settings.workspace_bytes)

    log_total = maximum + total.log()
    mean.div_(total[batch:, None])
    # sum_j q_j (t_j - s_j) is linear in U, and this product is exact to the compute dtype.
    cross = torch.sum((query[batch:] - query[:batch]) * mean, 1)
    membership = cross - log_total[batch:] + log_total[:batch]
    p_class = mass.div_(total[:batch, None])
    floored = p_class.clamp(min=settings.eps)
    prediction = torch.xlogy(q_class, q_class) - q_class * floored.log()
    # The floor is flat: classes below it draw no gradient.
    above = torch.where(p_class >= settings.eps, q_class, 0.0)
    saved = Saved(query, log_total[:batch].clone(), above / floored, above.sum(1), mean)
    return membership, temperature**2 * prediction.sum(1), saved


def _add_up(
    query: Tensor, q_class: Tensor, memory: Tensor, posterior: Tensor, filled: Tensor | None, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the memory, each row's under its largest similarity m: m, totals, class mass, teacher's rows."""
    batch = len(q_class)
    student, teacher = slice(batch), slice(batch, None)
    maximum = torch.full_like(query[:, 0], -torch.inf)
    total, mass = torch.zeros_like(maximum), torch.zeros_like(q_class)
    mean = torch.zeros_like(query[teacher])

    # A function, so that a slice's tensors are freed before the next one's are made.
    def add(rows: Tensor, posterior: Tensor, valid: Tensor | None) -> Tensor:
        rows = rows.to(query.dtype)
        similarity = query @ rows.T
        new = torch.maximum(maximum, _mask(similarity, valid).amax(1))
        rescale = (maximum - new).exp_()
        weights = similarity.sub_(new[:, None]).exp_()
        total.mul_(rescale).add_(weights.sum(1))
        mass.mul_(rescale[student, None])
        if posterior.ndim == 1:
            mass.index_add_(1, posterior, weights[student])
        else:
            mass.addmm_(weights[student], posterior.to(mass.dtype))
        mean.mul_(rescale[teacher, None]).addmm_(weights[teacher], rows)
        return new

    step = _slice_rows(*q_class.shape, query.dtype, memory, posterior, most)
    for start in range(0, len(memory), step):
        part = slice(start, start + step)
        maximum = add(memory[part], posterior[part], None if filled is None else filled - start)
    return maximum, total, mass, mean


def backward(
    student: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    saved: Saved,
    membership_grad: Tensor,
    prediction_grad: Tensor,
    settings: Settings,
) -> Tensor:
    """The gradient in `student`, of upstream gradients of B values each."""
    batch = len(student)
    prediction_grad = prediction_grad * settings.temperature**2
    offset = (membership_grad + prediction_grad * saved.above)[:, None]
    minus_ratio = saved.ratio * -prediction_grad[:, None]
    grad = saved.teacher_mean * -membership_grad[:, None]

    def add(rows: Tensor, posterior: Tensor, valid: Tensor | None) -> None:
        if posterior.ndim == 1:
            factor = (offset + minus_ratio)[:, posterior]
        else:
            factor = torch.addmm(offset, minus_ratio, posterior.to(minus_ratio.dtype).T)
        rows = rows.to(grad.dtype)
        log_p_member = torch.addmm(-saved.log_total[:, None], saved.query[:batch], rows.T)
        grad.addmm_(_mask(log_p_member, valid).exp_().mul_(factor), rows)

    step = _slice_rows(*minus_ratio.shape, grad.dtype, memory, posterior, settings.workspace_bytes)
    for start in range(0, len(memory), step):
        part = slice(start, start + step)
        add(memory[part], posterior[part], None if filled is None else filled - start)

    # Back through the normalisation.
    wide = student.to(grad.dtype)
    norm = wide.norm(dim=1, keepdim=True).clamp_min_(1e-12)
    unit = wide / norm
    grad.addcmul_(unit, (unit * grad).sum(1, keepdim=True), value=-1)
    return grad.mul_(settings.kappa_student / norm).to(student.dtype)


def _bytes_per_row(
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
    row = _bytes_per_row(batch, memory.shape[1], classes, dtype, memory, posterior)
    return max(1, (most or WORKSPACE_BYTES) // row)


def _mask(similarity: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return similarity
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    return similarity.masked_fill_(columns >= valid, -torch.inf)
