"""The objective over slices of the memory: bounded extra memory on any device, products by the vendor library.

Forward, a slice at a time: similarities of student and teacher in one product, then one pass over them that
turns them into unnormalised probabilities under a running maximum (online softmax), then the products that
need those: the class masses and the teacher's mean memory row. Backward recomputes the student's slice only:
with g_m, g_p the upstream gradients and r_j of DESIGN section 2,

    d loss / d s_j = p_j (g_m + g_p T^2 (Q - r_j)) - g_m q_j,      Q = sum of q(y) over p(y|x) >= eps

whose last term, summed over the memory, is the teacher's mean row, known since the forward pass.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

from kdav_fast.kernels import chunked_cpu
from kdav_fast.kernels.caller import without_autocast
from kdav_fast.kernels.reference import compute_dtype


def slices_for(device: torch.device) -> ModuleType:
    """The module with the passes over slices for tensors on `device`: its `add_up` and `add_slopes`."""
    if device.type != "cuda":
        return chunked_cpu
    from kdav_fast.kernels import chunked_gpu  # Triton is not on every system without a GPU

    return chunked_gpu


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

    Extra memory, whatever L is: at most `workspace_bytes` for a slice (but never less than one row of the memory
    needs, 256 on a GPU), and 10 values a class and 10 a dimension of each batch row for statistics. `None` stands for
    half of a GPU's L2 cache, so that a slice is still there for its next pass, and 64 MiB on a CPU.

    Returns:
        membership_kl and prediction_kl, B each.
    """
    dtype = compute_dtype(student_embedding, teacher_embedding, teacher_logits, memory_embedding)
    if isinstance(filled, int):
        memory_embedding, memory_posterior = memory_embedding[:filled], memory_posterior[:filled]
        filled = None
    membership, prediction = _ChunkedTerms.apply(
        kappa_student * F.normalize(student_embedding.to(dtype), dim=1),
        kappa_teacher * F.normalize(teacher_embedding.to(dtype), dim=1),
        torch.softmax(teacher_logits.to(dtype) / temperature, dim=1),
        memory_embedding,
        memory_posterior,
        filled,
        eps,
        workspace_bytes or 0,
    )
    return membership, temperature**2 * prediction


class _Saved(NamedTuple):
    """What the backward pass of the student's query needs."""

    student_query: Tensor
    memory: Tensor
    posterior: Tensor
    filled: Tensor | None
    log_total: Tensor
    """Of the student's rows, then the teacher's; 2B."""
    ratio: Tensor
    """q / p by class, 0 below the floor; B x K."""
    above: Tensor
    """Q, the sum of q over classes above the floor; B."""
    teacher_mean: Tensor


# Both passes are operators of their own, so that torch.compile of a caller takes each as one node instead of unrolling
# its loop over slices. (torch's `custom_op` does the same, and imports the compiler on its first call: seconds.)
_LIBRARY = library.Library("kdav_fast", "FRAGMENT")
_LIBRARY.define(
    "chunked_forward(Tensor student_query, Tensor teacher_query, Tensor q_class, Tensor memory, Tensor posterior, "
    "Tensor? filled, float eps, int workspace_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "chunked_backward(Tensor student_query, Tensor memory, Tensor posterior, Tensor? filled, Tensor log_total, "
    "Tensor ratio, Tensor above, Tensor teacher_mean, Tensor membership_grad, Tensor prediction_grad, "
    "int workspace_bytes) -> Tensor"
)


@library.impl(_LIBRARY, "chunked_forward", "CompositeExplicitAutograd")
def chunked_forward(
    student_query: Tensor,
    teacher_query: Tensor,
    q_class: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    eps: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both divergences (T^2 left out), then what `_Saved` has of them: log_total, ratio, above, teacher_mean."""
    batch, classes = q_class.shape
    with without_autocast(memory.device):
        sums = slices_for(memory.device).add_up(
            student_query, teacher_query, classes, memory, posterior, filled, workspace_bytes
        )
        total = sums.total
        log_total = sums.maximum + total.log()
        teacher_mean = sums.teacher_mean.div_(total[batch:, None]).contiguous()
        if sums.cross is None:
            # sum_j q_j (t_j - s_j) is linear in U, and this product is exact to the compute dtype.
            cross = torch.sum((teacher_query - student_query) * teacher_mean, 1)
        else:
            cross = sums.cross / total[batch:]
        membership = cross - log_total[batch:] + log_total[:batch]
        p_class = sums.mass.div_(total[:batch, None])
        floored = p_class.clamp(min=eps)
        prediction = torch.xlogy(q_class, q_class) - q_class * floored.log()
        # The floor is flat: classes below it draw no gradient.
        above = torch.where(p_class >= eps, q_class, 0.0)
        return (
            membership,
            prediction.sum(1),
            log_total,
            above / floored,
            above.sum(1),
            teacher_mean,
        )


@library.register_fake("kdav_fast::chunked_forward", lib=_LIBRARY)
def _(student_query, teacher_query, q_class, memory, posterior, filled, eps, workspace_bytes):
    rows = q_class.new_empty(len(q_class))
    like = torch.empty_like
    log_total = q_class.new_empty(2 * len(q_class))
    return rows, like(rows), log_total, like(q_class), like(rows), like(teacher_query)


@library.impl(_LIBRARY, "chunked_backward", "CompositeExplicitAutograd")
def chunked_backward(
    student_query: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    log_total: Tensor,
    ratio: Tensor,
    above: Tensor,
    teacher_mean: Tensor,
    membership_grad: Tensor,
    prediction_grad: Tensor,
    workspace_bytes: int,
) -> Tensor:
    """The gradient in the student's query; the first arguments are `_Saved`'s."""
    with without_autocast(memory.device):
        # Rows are brought to a common size and back at the end, so that float16 neither over- nor underflows.
        size = torch.maximum(membership_grad.abs(), prediction_grad.abs()).clamp(min=1e-30) / 4096
        membership_grad, prediction_grad = membership_grad / size, prediction_grad / size
        grad = teacher_mean * -membership_grad[:, None]
        slices_for(memory.device).add_slopes(
            grad,
            student_query,
            memory,
            posterior,
            filled,
            log_total[: len(size)],
            membership_grad + prediction_grad * above,
            ratio * -prediction_grad[:, None],
            workspace_bytes,
        )
        return grad.mul_(size[:, None])


@library.register_fake("kdav_fast::chunked_backward", lib=_LIBRARY)
def _(student_query, *others):
    return torch.empty_like(student_query)


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
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        membership, prediction, *saved = torch.ops.kdav_fast.chunked_forward(
            student_query, teacher_query, q_class, memory, posterior, filled, eps, workspace_bytes
        )
        ctx.save_for_backward(*_Saved(student_query, memory, posterior, filled, *saved))
        ctx.workspace_bytes = workspace_bytes
        return membership, prediction

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, membership_grad: Tensor, prediction_grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.ops.kdav_fast.chunked_backward(
            *ctx.saved_tensors, membership_grad, prediction_grad, ctx.workspace_bytes
        )
        return grad, *[None] * 7
