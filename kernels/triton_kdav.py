"""The objective by fused Triton kernels around matrix products of the vendor: launches and the operators.

Forward: one product writes both similarities, L x 2B; one kernel turns them into both softmaxes' sums and the class
masses (with dense posteriors into weights, which one more product turns into masses); one kernel forms both
divergences. Backward: the similarities are read once more, one kernel writes the slopes, one product multiplies them
with U. No shape and no launch depends on a value on the device, so that CUDA graphs capture both passes; they are
custom operators too, which torch.compile takes whole.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, library

from kdav_fast.kernels import triton_kernels as kernels
from kdav_fast.kernels.caller import on_device, without_autocast
from kdav_fast.kernels.class_order import ClassOrder
from kdav_fast.kernels.rounding import INTERPRETED
from kdav_fast.kernels.triton_order import order_on_gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# |s| <= kappa, since rows of the memory are unit: up to here exp(s - kappa) is far from float32's smallest number.
# Above it the largest similarity is looked for.
LARGEST_BOUND = 30.0
# Programs that a pass aims at, two to three for each multiprocessor, and the most parts of a memory.
PROGRAMS, MOST_PARTS, MAXIMUM_PARTS = 320, 1024, 64


class Blocks(NamedTuple):
    """Sizes of a program's tile; how many warps work on it."""

    items: int
    rows: int
    num_warps: int = 8


def pass_blocks(rows: int) -> Blocks:
    """Of the passes over similarities: whole vectors along the batch, 8 values a thread."""
    width = min(256, triton.next_power_of_2(rows))
    return Blocks(2048 // width, width)


def divergence_blocks(classes: int) -> Blocks:
    """Of the kernel that forms the divergences: all classes at once where registers hold them."""
    return Blocks(min(1024, triton.next_power_of_2(classes)), 4)


def padded(batch: int) -> int:
    """Rows that a batch takes in similarities: whole vectors, whatever the dtype."""
    return (batch + 15) // 16 * 16


def similarity_dtype(memory: Tensor) -> torch.dtype:
    """Of unit rows, their products and of what these are kept in, by the memory's.

    bfloat16 would do for neither: its 8 bits make errors of 2 % in a probability at kappa 10, above those of the plain
    torch operations. Unit rows and cosines fit float16, of the same size and with 8 times the precision.
    """
    return torch.float32 if memory.dtype == torch.float32 else torch.float16


def class_dtype(memory: Tensor, posterior: Tensor) -> torch.dtype:
    """Of dense weights and of ratios; float16 holds neither exp(-2 kappa) nor q / p."""
    half = memory.dtype != torch.float32 and posterior.dtype in (torch.bfloat16, torch.int64)
    return torch.bfloat16 if half else torch.float32


def triton_terms(
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
    weight_membership: float = 1.0,
    weight_prediction: float = 1.0,
    memory_order: ClassOrder | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row (DESIGN section 2), differentiable in `student_embedding`, and both divergences.

    Arguments are those of `kdav_loss`, already validated, on a CUDA device, in float32, float16 or bfloat16; products
    with the memory take float16 operands where it is half precision. Sums are taken in float32, in a fixed order.

    Extra memory: similarities, 2 B L values of 2 bytes (4 beside a float32 memory), kept for the backward pass; half
    as many slopes there, and with dense posteriors half as many weights (forward) and shares (backward). A bfloat16
    memory is copied to float16, dense posteriors to float32 where they or the memory are of another dtype than
    bfloat16. L must be below 2^31; every other offset has 64 bits.

    Returns:
        weight_membership * membership_kl + weight_prediction * prediction_kl, membership_kl and prediction_kl: B each,
        float32; only the first has a gradient.

    Raises:
        TypeError: a float64 input.
        ValueError: tensors that Triton cannot reach, a device that is too old, or a memory that is too long.
    """
    tensors = [student_embedding, teacher_embedding, teacher_logits, memory_embedding, memory_posterior]
    for tensor in tensors:
        if tensor.dtype not in (*DTYPES, torch.int64):
            raise TypeError(
                f"impl 'triton' was given {tensor.dtype}; it takes float32, float16 and bfloat16: "
                "use impl='chunked' or 'reference'"
            )
    _check_device(student_embedding.device)
    if memory_embedding.shape[0] >= 2**31:
        raise ValueError(
            f"impl 'triton' was given a memory of {memory_embedding.shape[0]} rows; it takes fewer than 2^31: "
            "use impl='chunked'"
        )
    student, teacher, logits, memory, posterior = (tensor.contiguous() for tensor in tensors)
    used = filled if isinstance(filled, Tensor) else None
    if used is None:
        memory, posterior = memory[:filled], posterior[:filled]
    order, starts = (None, None) if memory_order is None else memory_order
    settings = Settings(kappa_student, kappa_teacher, temperature, eps, weight_membership, weight_prediction)
    terms = fused_forward if torch.compiler.is_compiling() else _FusedTerms.apply
    loss, membership_kl, prediction_kl, *_ = terms(
        student, teacher, logits, memory, posterior, used, order, starts, *settings
    )
    return loss, membership_kl, prediction_kl


def _check_device(device: torch.device) -> None:
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(
                f"impl 'triton' was given a device of compute capability {major}.x; it needs 8.0 or newer: "
                "use impl='chunked'"
            )
    elif not INTERPRETED.value:
        raise ValueError(
            f"impl 'triton' was given tensors on {device}; it runs on CUDA: use impl='chunked', or start "
            "Python with TRITON_INTERPRET=1 to interpret the kernels (slow, for tests)"
        )


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed in float32 and rounded once, to `dtype`."""
    if not left.is_cuda:
        return (left.float() @ right.float()).to(dtype)
    return left @ right if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _shifted_product(left: Tensor, right: Tensor, shift: Tensor) -> Tensor:
    """shift + left @ right, summed in float32 and rounded once."""
    if left.is_cuda:
        return torch.addmm(shift, left, right)
    return torch.addmm(shift.float(), left.float(), right.float()).to(shift.dtype)


class Settings(NamedTuple):
    """The operators' numbers, in their order."""

    kappa_student: float
    kappa_teacher: float
    temperature: float
    eps: float
    weight_membership: float
    weight_prediction: float


class _Parts(NamedTuple):
    """How the memory is dealt to programs, and how that is told to the kernels."""

    count: int
    step: int
    """With class ids: pieces of each class. Else rows of a part."""


def memory_parts(length: int, rows: int, classes: int, blocks: Blocks, ids: bool) -> _Parts:
    """Enough parts for PROGRAMS programs; with class ids at least one a class."""
    columns = triton.cdiv(rows, blocks.rows)
    if ids:
        pieces = min(triton.cdiv(PROGRAMS, classes * columns), triton.cdiv(length, blocks.items), 64)
        return _Parts(classes * pieces, pieces)
    tiles = triton.cdiv(length, blocks.items)
    count = min(MOST_PARTS, tiles, max(triton.cdiv(PROGRAMS, columns), triton.cdiv(tiles, 8)))
    step = triton.cdiv(tiles, count) * blocks.items
    return _Parts(triton.cdiv(length, step), step)


def launch_forward(
    student: Tensor,
    teacher: Tensor,
    logits: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    kappa_student: float,
    kappa_teacher: float,
    temperature: float,
    eps: float,
    weight_membership: float,
    weight_prediction: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and both divergences of each row (B), then what the backward pass needs (`_Saved`)."""
    with on_device(student.device), without_autocast(student.device):
        (batch, width), length, classes = student.shape, memory.shape[0], logits.shape[1]
        kept, classed = similarity_dtype(memory), class_dtype(memory, posterior)
        outputs = _row_outputs(logits, posterior, classed)
        loss, membership_kl, prediction_kl, log_total, ratio, shift, above = outputs
        rows = padded(batch)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=student.device)

        unit = empty(2 * rows, width, dtype=kept)
        kernels.unit_kernel[(2 * rows,)](
            student, teacher, unit, batch, rows, width, BLOCK_D=triton.next_power_of_2(width)
        )
        similarity = _product(memory.to(kept), unit.T, kept)

        blocks = pass_blocks(rows)
        masked = {"MASKED": filled is not None, "BLOCK_L": blocks.items, "BLOCK_B": blocks.rows}
        bounded = max(kappa_student, kappa_teacher) <= LARGEST_BOUND
        top, top_parts = similarity, 1
        if not bounded:
            step = triton.cdiv(triton.cdiv(length, MAXIMUM_PARTS), blocks.items) * blocks.items
            top_parts = triton.cdiv(length, step)
            top = empty(top_parts, 2 * rows)
            kernels.maximum_kernel[(top_parts, triton.cdiv(2 * rows, blocks.rows))](
                similarity, filled, top, length, rows, step, **masked, num_warps=blocks.num_warps
            )
        ceiling = {"BOUNDED": bounded, "BLOCK_P": triton.next_power_of_2(top_parts)}

        ids = posterior.ndim == 1
        if ids and order is None:
            order, starts = order_on_gpu(posterior, classes, filled)
        parts, step = memory_parts(length, rows, classes, blocks, ids)
        partial = empty(3 if ids else 4, parts, rows)
        weights = similarity if ids else empty(length, rows, dtype=classed)
        kernels.membership_kernel[(parts, triton.cdiv(rows, blocks.rows))](
            similarity, top, filled, order, starts, partial, weights,
            length, rows, parts, step, top_parts, kappa_student, kappa_teacher,
            IDS=ids, **masked, **ceiling, num_warps=blocks.num_warps,
        )  # fmt: skip
        mass, pieces = partial, step
        if not ids:
            mass, pieces = _product(posterior.to(classed).T, weights, torch.float32), 1

        blocks = divergence_blocks(classes)
        kernels.divergence_kernel[(triton.cdiv(rows, blocks.rows),)](
            logits, top, partial, mass, loss, membership_kl, prediction_kl, log_total, ratio, shift, above,
            batch, rows, classes, parts, pieces, top_parts, kappa_student, kappa_teacher,
            temperature, eps, weight_membership, weight_prediction,
            IDS=ids, **ceiling, BLOCK_K=blocks.items, BLOCK_B=blocks.rows, num_warps=blocks.num_warps,
        )  # fmt: skip
        return loss, membership_kl, prediction_kl, similarity, log_total, ratio, shift, above


def _row_outputs(logits: Tensor, posterior: Tensor, classed: torch.dtype) -> tuple[Tensor, ...]:
    """What the forward pass returns beside the similarities, not yet written."""
    (batch, classes), rows = logits.shape, padded(logits.shape[0])

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    by_row = empty(batch), empty(batch), empty(batch)
    shifts = rows if posterior.ndim == 2 else 0
    by_class = empty(classes, rows, dtype=classed), empty(shifts, dtype=classed)
    return *by_row, empty(2, rows), *by_class, empty(rows)


fused_forward = library.custom_op("kdav_fast::fused_forward", launch_forward, mutates_args=())


@fused_forward.register_fake
def _fake_forward(
    student: Tensor, teacher: Tensor, logits: Tensor, memory: Tensor, posterior: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    shape = memory.shape[0], 2 * padded(student.shape[0])
    similarity = memory.new_empty(shape, dtype=similarity_dtype(memory))
    outputs = _row_outputs(logits, posterior, class_dtype(memory, posterior))
    return *outputs[:3], similarity, *outputs[3:]


class _Saved(NamedTuple):
    """Tensors for the backward pass."""

    student: Tensor
    memory: Tensor
    posterior: Tensor
    filled: Tensor | None
    similarity: Tensor
    """Cosines, L x 2 rows: the student's, then the teacher's."""
    log_total: Tensor
    """log sum exp of student and teacher, 2 x rows."""
    ratio: Tensor
    """q / p, 0 below the floor; K x rows."""
    shift: Tensor
    """What the product with a dense R adds to r, in ratio's dtype; rows. With class ids empty."""
    above: Tensor
    """Sum of p times ratio over the classes, dense: plus shift; rows."""


def launch_backward(
    grad: Tensor,
    student: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    similarity: Tensor,
    log_total: Tensor,
    ratio: Tensor,
    shift: Tensor,
    above: Tensor,
    kappa_student: float,
    kappa_teacher: float,
    temperature: float,
    weight_membership: float,
    weight_prediction: float,
) -> Tensor:
    """The gradient in `student`, of the gradient in each row's loss (B values, which may be one expanded)."""
    with on_device(student.device), without_autocast(student.device):
        (batch, width), length, (classes, rows) = student.shape, memory.shape[0], ratio.shape
        ids = posterior.ndim == 1
        share = ratio if ids else _shifted_product(posterior.to(ratio.dtype), ratio, shift)
        slope = torch.empty(length, rows, dtype=memory.dtype, device=student.device)
        blocks = pass_blocks(rows)
        weights = (temperature, weight_membership, weight_prediction)
        kernels.similarity_gradient_kernel[(triton.cdiv(length, blocks.items), triton.cdiv(rows, blocks.rows))](
            similarity, filled, posterior, share, log_total, above, grad, slope,
            batch, length, rows, classes, grad.stride(0), kappa_student, kappa_teacher, *weights,
            IDS=ids, MASKED=filled is not None, BLOCK_L=blocks.items, BLOCK_B=blocks.rows, num_warps=blocks.num_warps,
        )  # fmt: skip
        query_gradient = _product(slope.T, memory, torch.float32)
        result = torch.empty_like(student)
        kernels.embedding_gradient_kernel[(batch,)](
            student, grad, query_gradient, result, width, grad.stride(0), kappa_student, *weights,
            BLOCK_D=triton.next_power_of_2(width),
        )  # fmt: skip
        return result


fused_backward = library.custom_op("kdav_fast::fused_backward", launch_backward, mutates_args=())


@fused_backward.register_fake
def _fake_backward(grad: Tensor, student: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(student)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, _, _, memory, posterior, filled = inputs[:6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*_Saved(student, memory, posterior, filled, *output[3:]))
    ctx.settings = Settings(*inputs[8:])


def _gradients(launch: Any, ctx: Any, loss_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (7 + len(Settings._fields))
    if loss_grad is None:
        return None, *nothing
    settings: Settings = ctx.settings
    kappas = settings.kappa_student, settings.kappa_teacher
    weights = settings.temperature, settings.weight_membership, settings.weight_prediction
    return launch(loss_grad, *ctx.saved_tensors, *kappas, *weights), *nothing


fused_forward.register_autograd(
    lambda ctx, loss_grad, *_: _gradients(fused_backward, ctx, loss_grad), setup_context=_save
)


class _FusedTerms(torch.autograd.Function):
    """The operators without their dispatch, which is a third of the host's time where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(launch_backward, ctx, loss_grad)
