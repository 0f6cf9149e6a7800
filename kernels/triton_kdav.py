"""The objective by fused Triton kernels: launches and the autograd function."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdav_fast.kernels import triton_kernels as kernels
from kdav_fast.kernels.tiles import TILES, architecture

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# float32 products take three TF32 ones of split operands: 2^-21 relative or so, on the matrix units.
FLOAT32_PRECISION = "tf32x3"
MAX_SPLITS = 64
# A row's sum over splits, and the class tile of the kernel that forms the divergences.
DIVERGENCE_BLOCK_K = 256


def product_constants(
    embedding_dtype: torch.dtype, posterior_dtype: torch.dtype, classes: int
) -> dict[str, Any]:
    """Constants of the matrix products: alignment, operand types and how float32 ones are multiplied.

    Triton itself tells rows of R aligned only where K is a multiple of 16, which 1000 is not; 8 is enough for
    loads of 16 bytes.

    Class products stay in bfloat16 where the posterior is (or is class ids beside a bfloat16 memory). float16
    cannot hold a ratio q / p: beside it they take TF32, whose mantissa is float16's.
    """
    dense = posterior_dtype.is_floating_point
    narrow = embedding_dtype == torch.bfloat16 and posterior_dtype in (torch.bfloat16, torch.int64)
    half = posterior_dtype if dense else embedding_dtype
    return {
        "GROUP": 8 if classes % 8 == 0 else 1,
        "DENSE": dense,
        "DTYPE": TRITON_DTYPE[embedding_dtype],
        "PRECISION": FLOAT32_PRECISION,
        "CLASS_DTYPE": tl.bfloat16 if narrow else tl.float32,
        "CLASS_PRECISION": FLOAT32_PRECISION if half == torch.float32 else "tf32",
    }


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
) -> tuple[Tensor, Tensor]:
    """Both divergences per row (DESIGN section 2), differentiable in `student_embedding`.

    Arguments are those of `kdav_loss`, already validated, on a CUDA device, in float32, float16 or bfloat16;
    embeddings of unlike dtypes are multiplied in their common one. Sums are taken in float32 and two runs give
    the same bits. Extra memory: splits x B x (K + d) partial sums, and none that grows with L.

    Returns:
        membership_kl and prediction_kl, B each, float32.

    Raises:
        TypeError: a float64 input.
        ValueError: tensors that Triton cannot reach.
    """
    tensors = [student_embedding, teacher_embedding, teacher_logits, memory_embedding, memory_posterior]
    for tensor in tensors:
        if tensor.dtype not in (*TRITON_DTYPE, torch.int64):
            raise TypeError(
                f"impl 'triton' was given {tensor.dtype}; it takes float32, float16 and bfloat16: "
                "use impl='chunked' or 'reference'"
            )
    device = student_embedding.device
    if device.type != "cuda" and isinstance(kernels.class_kernel, triton.JITFunction):
        raise ValueError(
            f"impl 'triton' was given tensors on {device}; it runs on CUDA: use impl='chunked', or start "
            "Python with TRITON_INTERPRET=1 to interpret the kernels (slow, for tests)"
        )
    if isinstance(filled, int):
        filled = torch.full((), filled, dtype=torch.int64, device=device)
    return _TritonTerms.apply(
        *(tensor.contiguous() for tensor in tensors), filled, kappa_student, kappa_teacher, temperature, eps
    )


class _Saved(NamedTuple):
    """Tensors for the backward pass, in the order of the gradient kernel's first arguments."""

    student: Tensor
    teacher: Tensor
    memory: Tensor
    posterior: Tensor
    filled: Tensor
    inverse_norm: Tensor
    """Of student and teacher, 2 x B."""
    log_total: Tensor
    """The same shape."""
    ratio: Tensor
    """q / p by class, B x K."""
    above: Tensor
    """Sum of q over the classes above the floor, B."""


class _Settings(NamedTuple):
    """What both passes compute with."""

    kappa_student: float
    kappa_teacher: float
    temperature: float
    dtype: torch.dtype
    """Of the products of embeddings."""
    constants: dict[str, Any]
    """Of the matrix products."""


class _TritonTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        logits: Tensor,
        memory: Tensor,
        posterior: Tensor,
        filled: Tensor,
        kappa_student: float,
        kappa_teacher: float,
        temperature: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        (batch, width), length, classes = student.shape, memory.shape[0], logits.shape[1]
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), memory.dtype)
        constants = product_constants(dtype, posterior.dtype, classes)
        ctx.settings = _Settings(kappa_student, kappa_teacher, temperature, dtype, constants)
        similarity = {key: constants[key] for key in ("DTYPE", "PRECISION")}

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=student.device)

        tiles = TILES[architecture(student.device)]
        tile = tiles["membership"][dtype]
        row_tiles = triton.cdiv(batch, tile.rows)
        splits = _splits(row_tiles, length, tile.items, student.device)
        partial, inverse_norm = empty(5, splits, batch), empty(2, batch)
        kernels.membership_kernel[(row_tiles, splits)](
            student, teacher, memory, filled, partial, inverse_norm,
            batch, length, width, splits, kappa_student, kappa_teacher,
            **tile.constants(), **tile.options(), **similarity,
        )  # fmt: skip

        tile = tiles["dense" if posterior.ndim == 2 else "ids"][dtype]
        row_tiles, class_tiles = triton.cdiv(batch, tile.rows), triton.cdiv(classes, tile.classes)
        class_splits = _splits(row_tiles * class_tiles, length, tile.items, student.device)
        class_partial = empty(class_splits, batch, classes)
        class_statistics = empty(2, class_splits, batch)
        kernels.class_kernel[(row_tiles, class_tiles, class_splits)](
            student, memory, posterior, filled, class_partial, class_statistics,
            batch, length, width, classes // constants["GROUP"], class_splits, kappa_student,
            **tile.constants(), **tile.options(), **constants,
        )  # fmt: skip

        membership_kl, prediction_kl, above = empty(batch), empty(batch), empty(batch)
        log_total, ratio = empty(2, batch), empty(batch, classes)
        if constants["DENSE"] and constants["CLASS_DTYPE"] == tl.bfloat16:
            ratio = torch.empty_like(ratio, dtype=torch.bfloat16)  # as its product takes it
        kernels.divergence_kernel[(batch,)](
            logits, partial, class_partial, class_statistics, membership_kl, prediction_kl, log_total, ratio, above,
            batch, classes, splits, class_splits, temperature, eps,
            BLOCK_K=DIVERGENCE_BLOCK_K, BLOCK_S=MAX_SPLITS,
        )  # fmt: skip
        saved = _Saved(student, teacher, memory, posterior, filled, inverse_norm, log_total, ratio, above)
        ctx.save_for_backward(*saved)
        return membership_kl, prediction_kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, membership_grad: Tensor, prediction_grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        kappa_student, kappa_teacher, temperature, dtype, constants = ctx.settings
        (batch, width), length, classes = saved.student.shape, len(saved.memory), saved.ratio.shape[1]
        # `loss.mean()` hands down one value expanded over the rows.
        upstream = membership_grad.contiguous(), prediction_grad.contiguous()

        tile = TILES[architecture(saved.student.device)]["gradient"][dtype]
        row_tiles, column_tiles = triton.cdiv(batch, tile.rows), triton.cdiv(width, tile.width)
        splits = _splits(row_tiles * column_tiles, length, tile.items, saved.student.device)
        partial = torch.empty(splits, batch, width, dtype=torch.float32, device=saved.student.device)
        kernels.gradient_kernel[(row_tiles, column_tiles, splits)](
            *saved, *upstream, partial,
            batch, length, width, classes // constants["GROUP"], splits, kappa_student, kappa_teacher, temperature,
            **tile.constants(), **tile.options(), **constants,
        )  # fmt: skip
        grad = torch.empty_like(saved.student)
        kernels.embedding_gradient_kernel[(batch,)](
            saved.student, saved.inverse_norm, *upstream, partial, grad,
            batch, width, splits, kappa_student, temperature, BLOCK_W=triton.next_power_of_2(width),
        )  # fmt: skip
        return grad, *[None] * 9


def _splits(tiles: int, length: int, block: int, device: torch.device) -> int:
    """Into how many parts to cut the memory, so that `tiles` programs a part fill the device once."""
    processors = 8  # the interpreter: several splits, so that tests add them
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(processors // tiles, triton.cdiv(length, block), MAX_SPLITS))
