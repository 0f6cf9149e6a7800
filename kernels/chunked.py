"""The objective over slices of the memory: bounded extra memory on any device, products by the vendor library.

Forward, a slice at a time: similarities of student and teacher in one product, then one pass over them that
turns them into unnormalised probabilities under a running maximum (online softmax), then the products that
need those: the class masses and the teacher's mean memory row. Backward recomputes the student's slice only:
with g_m, g_p the upstream gradients and r_j of DESIGN section 2,

    d loss / d s_j = p_j (g_m + g_p T^2 (Q - r_j)) - g_m q_j,      Q = sum of q(y) over p(y|x) >= eps

whose last term, summed over the memory, is the teacher's mean row, known since the forward pass.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdav_fast.kernels.caller import without_autocast
from kdav_fast.kernels.reference import compute_dtype

CPU_WORKSPACE_BYTES = 64 * 2**20


def default_workspace_bytes(device: torch.device) -> int:
    """Half of a GPU's L2 cache, so that a slice is still there for its next pass; 64 MiB on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size // 2
    return CPU_WORKSPACE_BYTES


def bytes_per_row(
    batch: int, width: int, classes: int, dtype: torch.dtype, memory: Tensor, posterior: Tensor
) -> int:
    """Workspace that one row of the memory needs: what a slice holds at most at a time, over its rows.

    Two values of `dtype` a batch row (both similarities, or the student's and its factor); a mask; the row of
    U and of R where they have to be converted to `dtype`, or built from class ids (GPU).
    """
    built = posterior.is_cuda if posterior.ndim == 1 else posterior.dtype != dtype
    converted = width * (memory.dtype != dtype) + classes * built
    return dtype.itemsize * (2 * batch + converted) + 1


def chunked_terms(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    teacher_logits: Tensor,
    memory_embedding: Tensor,
    memory_posterior: Tensor,
    filled: int | Tensor,
    *,
    kappa_student: float,
    kappa_teacher: float,
    temperature: float,
    eps: float,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both divergences per row (DESIGN section 2), differentiable in `student_embedding`.

    Arguments are those of `kdav_loss`, already validated. Sums are taken in float64 if any input is float64,
    else in float32.

    Extra memory, whatever L is: at most `workspace_bytes` (but never less than one row of the memory needs)
    for a slice, and 10 values a class and 10 a dimension of each batch row for statistics. `None` stands for
    `default_workspace_bytes`.

    Returns:
        membership_kl and prediction_kl, B each.
    """
    dtype = compute_dtype(student_embedding, teacher_embedding, teacher_logits, memory_embedding)
    if isinstance(filled, int):
        memory_embedding, memory_posterior = memory_embedding[:filled], memory_posterior[:filled]
        filled = None
    batch, classes = teacher_logits.shape
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(memory_embedding.device)
    row = bytes_per_row(batch, memory_embedding.shape[1], classes, dtype, memory_embedding, memory_posterior)
    membership, prediction = _ChunkedTerms.apply(
        kappa_student * F.normalize(student_embedding.to(dtype), dim=1),
        kappa_teacher * F.normalize(teacher_embedding.to(dtype), dim=1),
        torch.softmax(teacher_logits.to(dtype) / temperature, dim=1),
        memory_embedding,
        memory_posterior,
        filled,
        eps,
        max(1, workspace_bytes // row),
    )
    return membership, temperature**2 * prediction


class _RunningSums:
    """Sums over the memory, each row's under its running maximum (online softmax): B student rows, then the teacher's.

    Args:
        student_query, teacher_query: kappa * unit embedding, B x d.
        q_class: the teacher's class probabilities, B x K.
    """

    def __init__(self, student_query: Tensor, teacher_query: Tensor, q_class: Tensor) -> None:
        self._queries = torch.cat([student_query, teacher_query])
        self._batch = len(q_class)
        self.maximum = torch.full_like(self._queries[:, 0], -torch.inf)
        """m, the largest similarity s so far; 2B."""
        self.total = torch.zeros_like(self.maximum)
        """Of exp(s - m); 2B."""
        self.cross = torch.zeros_like(self.maximum[: self._batch])
        """Of exp(t - m) (t - s), with the teacher's similarity t; B, on a GPU only."""
        self.mass = torch.zeros_like(q_class)
        """Of exp(s - m) R, by class; B x K."""
        self.teacher_mean = torch.zeros_like(teacher_query)
        """Of exp(t - m) U; B x d."""

    def add(self, memory: Tensor, posterior: Tensor, valid: Tensor | None) -> None:
        """Add a slice of the memory, of which the `valid` leading rows are in use; None means all."""
        rows = _in_compute_dtype(memory, self._queries.dtype)
        similarity = _product(self._queries, rows.T)
        if memory.is_cuda:
            from kdav_fast.kernels import triton_chunk  # Triton is not on every system without a GPU

            weights, rescale = triton_chunk.absorb(
                similarity, self.maximum, self.total, self.cross, valid, rows.dtype
            )
        else:
            weights, rescale = self._absorb(similarity, valid)
        student, teacher = slice(self._batch), slice(self._batch, None)
        self.mass.mul_(rescale[student, None])
        _add_class_mass(self.mass, weights[student], posterior)
        self.teacher_mean.mul_(rescale[teacher, None])
        _add_product(self.teacher_mean, weights[teacher], rows)

    def _absorb(self, similarity: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `triton_chunk.absorb` does, but for `cross`, which a CPU has from the teacher's mean."""
        maximum = torch.maximum(self.maximum, _mask(similarity, valid).amax(1))
        rescale = (self.maximum - maximum).exp_()
        weights = similarity.sub_(maximum[:, None]).exp_()
        self.maximum = maximum
        self.total.mul_(rescale).add_(weights.sum(1))
        return weights, rescale


class _Saved(NamedTuple):
    """What the backward pass of the student's query needs."""

    student_query: Tensor
    memory: Tensor
    posterior: Tensor
    filled: Tensor | None
    log_total: Tensor
    """Of the student's rows; B."""
    ratio: Tensor
    """q / p by class, 0 below the floor; B x K."""
    above: Tensor
    """Q, the sum of q over classes above the floor; B."""
    teacher_mean: Tensor


class _ChunkedTerms(torch.autograd.Function):
    """Both divergences (T^2 left out) of queries kappa * unit embedding; saves nothing that grows with L."""

    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,
        teacher_query: Tensor,
        q_class: Tensor,
        memory: Tensor,
        posterior: Tensor,
        filled: Tensor | None,
        eps: float,
        slice_rows: int,
    ) -> tuple[Tensor, Tensor]:
        sums = _RunningSums(student_query, teacher_query, q_class)
        for start in range(0, memory.shape[0], slice_rows):
            part = slice(start, start + slice_rows)
            sums.add(memory[part], posterior[part], None if filled is None else filled - start)

        batch, total = len(q_class), sums.total
        log_total = sums.maximum + total.log()
        teacher_mean, cross = sums.teacher_mean.div_(total[batch:, None]), sums.cross
        if memory.is_cuda:
            cross.div_(total[batch:])
        else:
            # sum_j q_j (t_j - s_j) is linear in U, and this product is exact to the compute dtype.
            torch.sum((teacher_query - student_query) * teacher_mean, 1, out=cross)
        membership = cross - log_total[batch:] + log_total[:batch]
        p_class = sums.mass.div_(total[:batch, None])
        prediction = torch.xlogy(q_class, q_class) - q_class * p_class.clamp(min=eps).log()
        # The floor is flat: classes below it draw no gradient.
        above = torch.where(p_class >= eps, q_class, 0.0)
        ratio = above / p_class.clamp(min=eps)
        saved = _Saved(
            student_query, memory, posterior, filled, log_total[:batch], ratio, above.sum(1), teacher_mean
        )
        ctx.save_for_backward(*saved)
        ctx.slice_rows = slice_rows
        return membership, prediction.sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, membership_grad: Tensor, prediction_grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(membership_grad.device):
            grad = _gradient(_Saved(*ctx.saved_tensors), ctx.slice_rows, membership_grad, prediction_grad)
            return grad, *[None] * 7


def _gradient(saved: _Saved, slice_rows: int, membership_grad: Tensor, prediction_grad: Tensor) -> Tensor:
    """The gradient in the student's query."""
    # Rows are brought to a common size and back at the end, so that float16 neither over- nor underflows.
    size = torch.maximum(membership_grad.abs(), prediction_grad.abs()).clamp(min=1e-30) / 4096
    membership_grad, prediction_grad = membership_grad / size, prediction_grad / size
    minus_ratio = saved.ratio * -prediction_grad[:, None]
    offset = (membership_grad + prediction_grad * saved.above)[:, None]
    grad = saved.teacher_mean * -membership_grad[:, None]
    for start in range(0, saved.memory.shape[0], slice_rows):
        part = slice(start, start + slice_rows)
        _add_slice_gradient(
            grad,
            saved.student_query,
            saved.memory[part],
            saved.posterior[part],
            None if saved.filled is None else saved.filled - start,
            saved.log_total,
            offset,
            minus_ratio,
        )
    return grad.mul_(size[:, None])


# A function, as `_RunningSums.add` is one, so that a slice's tensors are freed before the next one's are made.
def _add_slice_gradient(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    posterior: Tensor,
    valid: Tensor | None,
    log_total: Tensor,
    offset: Tensor,
    minus_ratio: Tensor,
) -> None:
    """grad += the student's slopes over a slice of the memory @ U."""
    share = _class_share(offset, minus_ratio, posterior)
    rows = _in_compute_dtype(memory, query.dtype)
    if memory.is_cuda:
        from kdav_fast.kernels import triton_chunk

        slope = triton_chunk.slope(_product(query, rows.T), share, log_total, valid, rows.dtype)
    else:
        log_p_member = torch.addmm(-log_total[:, None], query, rows.T)
        slope = _mask(log_p_member, valid).exp_().mul_(share)
    _add_product(grad, slope, rows)


def _mask(similarity: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return similarity
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    return similarity.masked_fill_(columns >= valid, -torch.inf)


def _in_compute_dtype(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Half-precision rows stay as they are on a GPU, whose matrix units widen them on the way."""
    return rows if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16) else rows.to(dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in left's dtype; half-precision `right` rounds `left` to its own."""
    if left.dtype == right.dtype:
        return left @ right
    return torch.mm(left.to(right.dtype), right, out_dtype=left.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


def _class_rows(posterior: Tensor, weights: Tensor) -> Tensor:
    """R of a slice for a product with `weights`. float16 is too narrow for a ratio q / p: it is widened."""
    if posterior.is_cuda and posterior.dtype == torch.bfloat16:
        return posterior
    return posterior.to(weights.dtype if weights.dtype == torch.float64 else torch.float32)


def _add_class_mass(mass: Tensor, weights: Tensor, posterior: Tensor) -> None:
    """mass += weights @ R, for a slice of R as probabilities or as class ids."""
    if posterior.ndim == 1 and not posterior.is_cuda:
        mass.index_add_(1, posterior, weights)
        return
    if posterior.ndim == 1:
        # index_add_ on a GPU adds in no fixed order; a product does.
        classes = torch.arange(mass.shape[1], device=posterior.device)
        rows = (posterior[:, None] == classes).to(weights.dtype)
    else:
        rows = _class_rows(posterior, mass)
    _add_product(mass, weights.to(rows.dtype), rows)


def _class_share(offset: Tensor, minus_ratio: Tensor, posterior: Tensor) -> Tensor:
    """offset - sum_y ratio(y) R_j(y) for a slice of R, B x rows."""
    if posterior.ndim == 1:
        return (offset + minus_ratio)[:, posterior]
    rows = _class_rows(posterior, minus_ratio).T
    if rows.dtype == minus_ratio.dtype:
        return torch.addmm(offset, minus_ratio, rows)
    return _product(minus_ratio, rows).add_(offset)
