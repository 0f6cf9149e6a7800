"""The objective over slices of the memory: bounded extra memory on any device, products by the vendor library.

Forward, a slice at a time: similarities of student and teacher in one product, then one pass over them that
turns them into unnormalised probabilities under a running maximum (online softmax), then the products that
need those: the class masses and the teacher's mean memory row. Backward recomputes the student's slice only:
with g_m, g_p the upstream gradients and r_j of DESIGN section 2,

    d loss / d s_j = p_j (g_m + g_p T^2 (Q - r_j)) - g_m q_j,      Q = sum of q(y) over p(y|x) >= eps

whose last term, summed over the memory, is the teacher's mean row, known since the forward pass.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from kdav_fast.kernels import chunked_cpu
from kdav_fast.kernels.caller import without_autocast
from kdav_fast.kernels.records import Saved, Settings
from kdav_fast.kernels.reference import compute_dtype


def passes_for(device: torch.device) -> ModuleType:
    """The module with both passes for tensors on `device`: its `forward` and `backward`."""
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
    three quarters of a GPU's L2 cache, so that a slice is still there for its next pass, and 64 MiB on a CPU.

    Returns:
        membership_kl and prediction_kl, B each.
    """
    if isinstance(filled, int):
        memory_embedding, memory_posterior = memory_embedding[:filled], memory_posterior[:filled]
        filled = None
    return _ChunkedTerms.apply(
        student_embedding,
        teacher_embedding,
        teacher_logits,
        memory_embedding,
        memory_posterior,
        filled,
        Settings(kappa_student, kappa_teacher, temperature, eps, workspace_bytes or 0),
    )


# Both passes are operators of their own, so that torch.compile of a caller takes each as one node instead of unrolling
# its loop over slices. (torch's `custom_op` does the same, and imports the compiler on its first call: seconds.)
_LIBRARY = library.Library("kdav_fast", "FRAGMENT")
_SETTINGS = "float kappa_student, float kappa_teacher, float temperature, float eps, int workspace_bytes"
_LIBRARY.define(
    "chunked_forward(Tensor student, Tensor teacher, Tensor logits, Tensor memory, Tensor posterior, Tensor? filled, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "chunked_backward(Tensor student, Tensor memory, Tensor posterior, Tensor? filled, Tensor query, Tensor log_total, "
    "Tensor ratio, Tensor above, Tensor teacher_mean, Tensor membership_grad, Tensor prediction_grad, "
    f"{_SETTINGS}) -> Tensor"
)


@library.impl(_LIBRARY, "chunked_forward", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, settings = arguments[:6], Settings(*arguments[6:])
    with without_autocast(tensors[0].device):
        membership_kl, prediction_kl, saved = passes_for(tensors[0].device).forward(*tensors, settings)
    return membership_kl, prediction_kl, *saved


@library.register_fake("kdav_fast::chunked_forward", lib=_LIBRARY)
def _fake_forward(
    student: Tensor, teacher: Tensor, logits: Tensor, memory: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(student, teacher, logits, memory)
    (batch, width), classes = student.shape, logits.shape[1]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return student.new_empty(shape, dtype=dtype)

    query = empty(2 * batch, width, dtype=passes_for(student.device).query_dtype(memory, dtype))
    return (
        empty(batch),
        empty(batch),
        query,
        empty(batch),
        empty(batch, classes),
        empty(batch),
        empty(batch, width),
    )


@library.impl(_LIBRARY, "chunked_backward", "CompositeExplicitAutograd")
def _backward(*arguments: Any) -> Tensor:
    tensors, saved, upstream = arguments[:4], Saved(*arguments[4:9]), arguments[9:11]
    with without_autocast(tensors[0].device):
        return passes_for(tensors[0].device).backward(*tensors, saved, *upstream, Settings(*arguments[11:]))


@library.register_fake("kdav_fast::chunked_backward", lib=_LIBRARY)
def _fake_backward(student: Tensor, *others: Any) -> Tensor:
    return student.new_empty(student.shape)


class _ChunkedTerms(torch.autograd.Function):
    """Saves nothing that grows with L."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, settings = arguments
        membership_kl, prediction_kl, *saved = torch.ops.kdav_fast.chunked_forward(*tensors, *settings)
        student, _, _, *memory = tensors
        ctx.save_for_backward(student, *memory, *saved)
        ctx.settings = settings
        return membership_kl, prediction_kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, membership_grad: Tensor, prediction_grad: Tensor) -> tuple[Tensor | None, ...]:
        upstream = membership_grad, prediction_grad
        grad = torch.ops.kdav_fast.chunked_backward(*ctx.saved_tensors, *upstream, *ctx.settings)
        return grad, *[None] * 6
