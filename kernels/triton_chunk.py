# ruff: noqa: N803  (Triton writes compile-time constants in capitals)
"""The chunked objective's elementwise passes on a GPU: one Triton kernel between two matrix products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def absorb_kernel(
    similarity, weights, maximum, total, cross, rescale, valid, batch, columns,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running softmax statistics of one row of student and teacher over one slice."""
    row = tl.program_id(0).to(tl.int64)
    used = columns
    if MASKED:
        used = tl.minimum(columns, tl.load(valid).to(tl.int32))
    student, teacher = similarity + row * columns, similarity + (batch + row) * columns
    dtype: tl.constexpr = similarity.dtype.element_ty
    student_best = tl.full([BLOCK], float("-inf"), dtype)
    teacher_best = tl.full([BLOCK], float("-inf"), dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        student_best = tl.maximum(student_best, tl.load(student + column, column < used, float("-inf")))
        teacher_best = tl.maximum(teacher_best, tl.load(teacher + column, column < used, float("-inf")))
    student_old, teacher_old = tl.load(maximum + row), tl.load(maximum + batch + row)
    student_max = tl.maximum(student_old, tl.max(student_best, 0))
    teacher_max = tl.maximum(teacher_old, tl.max(teacher_best, 0))

    student_sum = tl.zeros([BLOCK], dtype)
    teacher_sum = tl.zeros([BLOCK], dtype)
    cross_sum = tl.zeros([BLOCK], dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s = tl.load(student + column, column < used, float("-inf"))
        t = tl.load(teacher + column, column < used, float("-inf"))
        p, q = tl.exp(s - student_max), tl.exp(t - teacher_max)
        student_sum += p
        teacher_sum += q
        cross_sum += tl.where(column < used, q * (t - s), 0.0)
        tl.store(weights + row * columns + column, p, column < columns)
        tl.store(weights + (batch + row) * columns + column, q, column < columns)

    student_shrink = tl.exp(student_old - student_max)
    teacher_shrink = tl.exp(teacher_old - teacher_max)
    tl.store(rescale + row, student_shrink)
    tl.store(rescale + batch + row, teacher_shrink)
    tl.store(maximum + row, student_max)
    tl.store(maximum + batch + row, teacher_max)
    tl.store(total + row, tl.load(total + row) * student_shrink + tl.sum(student_sum, 0))
    tl.store(total + batch + row, tl.load(total + batch + row) * teacher_shrink + tl.sum(teacher_sum, 0))
    tl.store(cross + row, tl.load(cross + row) * teacher_shrink + tl.sum(cross_sum, 0))


@triton.jit
def slope_kernel(
    similarity, share, log_total, valid, slope, columns, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """exp(s - log_total) * share for one block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = columns
    if MASKED:
        used = tl.minimum(columns, tl.load(valid).to(tl.int32))
    s = tl.load(similarity + row * columns + column, column < used, float("-inf"))
    factor = tl.load(share + row * columns + column, column < used, 0.0)
    tl.store(slope + row * columns + column, tl.exp(s - tl.load(log_total + row)) * factor, column < columns)


def absorb(
    similarity: Tensor,
    maximum: Tensor,
    total: Tensor,
    cross: Tensor,
    valid: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Adds a slice to the running softmax statistics.

    Args:
        similarity: scaled similarities of the student's rows, then the teacher's: 2B x n, contiguous; overwritten
            where `dtype` is its own.
        maximum, total: running maximum m and sum of exp(s - m), 2B. Updated in place.
        cross: running sum of exp(t - m_t) (t - s), B. Updated in place.
        valid: how many leading columns are in use; `None` means all.
        dtype: of the returned weights.

    Returns:
        exp(s - m), 2B x n, and the factor by which earlier sums, taken under the old maximum, shrink, 2B.
    """
    weights = similarity if dtype == similarity.dtype else torch.empty_like(similarity, dtype=dtype)
    rescale = torch.empty_like(maximum)
    absorb_kernel[(len(cross),)](
        similarity, weights, maximum, total, cross, rescale, similarity if valid is None else valid,
        len(cross), similarity.shape[1], MASKED=valid is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return weights, rescale


def slope(
    similarity: Tensor, share: Tensor, log_total: Tensor, valid: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """exp(s - log_total) * share in `dtype`, B x n: a slice's gradient in s, the teacher's part left out."""
    result = similarity if dtype == similarity.dtype else torch.empty_like(similarity, dtype=dtype)
    batch, columns = similarity.shape
    slope_kernel[(batch, triton.cdiv(columns, BLOCK))](
        similarity, share.contiguous(), log_total, similarity if valid is None else valid, result,
        columns, MASKED=valid is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return result
