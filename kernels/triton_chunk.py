# ruff: noqa: N803  (Triton writes compile-time constants in capitals)
"""The chunked objective's passes between two matrix products on a GPU: one Triton kernel each.

A slice's similarities, weights and slopes are matrices whose rows lie BLOCK values apart, a power of two. So a
kernel loads and stores whole rows of BLOCK without a mask, 16 bytes at a time, whatever part of the slice is in use:
`tl.where` takes what is not in use out, and no later product reads it.
"""

import triton
import triton.language as tl


@triton.jit
def _in_use(columns, filled, start, MASKED: tl.constexpr):
    """How many of a slice's leading columns count, where the slice starts at row `start` of the memory."""
    used = columns
    if MASKED:
        used = tl.minimum(columns, tl.load(filled).to(tl.int64) - start)
    return used


@triton.jit
def _scale_row(values, width, factor, PART: tl.constexpr):
    for first in range(0, width, PART):
        column = first + tl.arange(0, PART)
        value = tl.load(values + column, column < width)
        tl.store(values + column, value * factor, column < width)


@triton.jit
def absorb_kernel(
    similarity, weights, maximum, total, cross, mass, mean, filled, start, columns, batch, mass_width, mean_width,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adds one slice to the running softmax statistics of one row of student and teacher.

    Reads the similarities s and t of the row once and writes exp(s - m), exp(t - m) with m the maxima so far.
    Where a maximum grows, the row's earlier sums, taken under the old one, shrink: totals, class mass, mean row.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < _in_use(columns, filled, start, MASKED)
    student, teacher = row * BLOCK + column, (batch + row) * BLOCK + column
    s = tl.where(here, tl.load(similarity + student), float("-inf"))
    t = tl.where(here, tl.load(similarity + teacher), float("-inf"))
    student_old, teacher_old = tl.load(maximum + row), tl.load(maximum + batch + row)
    student_max = tl.maximum(student_old, tl.max(s, 0))
    teacher_max = tl.maximum(teacher_old, tl.max(t, 0))
    p, q = tl.exp(s - student_max), tl.exp(t - teacher_max)
    tl.store(weights + student, p.to(weights.dtype.element_ty))
    tl.store(weights + teacher, q.to(weights.dtype.element_ty))

    student_shrink, teacher_shrink = tl.exp(student_old - student_max), tl.exp(teacher_old - teacher_max)
    tl.store(maximum + row, student_max)
    tl.store(maximum + batch + row, teacher_max)
    tl.store(total + row, tl.load(total + row) * student_shrink + tl.sum(p, 0))
    tl.store(total + batch + row, tl.load(total + batch + row) * teacher_shrink + tl.sum(q, 0))
    difference = tl.sum(tl.where(here, q * (t - s), 0.0), 0)
    tl.store(cross + row, tl.load(cross + row) * teacher_shrink + difference)
    # Seldom after the first slices. At the first one there is nothing to shrink.
    if (start > 0) & (student_shrink != 1.0):
        _scale_row(mass + row * mass_width, mass_width, student_shrink, PART)
    if (start > 0) & (teacher_shrink != 1.0):
        _scale_row(mean + row * mean_width, mean_width, teacher_shrink, PART)


@triton.jit
def slope_kernel(
    similarity, share, ids, offset, log_total, filled, start, columns, classes, slope,
    DENSE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """exp(s - log_total) * (offset + share) for PART columns of one row: its slope, the teacher's part left out.

    `share` is a matrix like `similarity` (DENSE), or has a value a class, which `ids` looks up.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * PART + tl.arange(0, PART)
    here = column < _in_use(columns, filled, start, MASKED)
    s = tl.load(similarity + row * BLOCK + column)
    if DENSE:
        factor = tl.load(share + row * BLOCK + column)
    else:
        class_id = tl.load(ids + column, column < columns, -1)
        known = here & (class_id >= 0) & (class_id < classes)
        factor = tl.load(share + row * classes + class_id, known, 0.0)
    factor += tl.load(offset + row)
    value = tl.where(here, tl.exp(s - tl.load(log_total + row)) * factor, 0.0)
    tl.store(slope + row * BLOCK + column, value.to(slope.dtype.element_ty))


@triton.jit
def one_hot_kernel(ids, one_hot, columns, row_width, ROWS: tl.constexpr, PART: tl.constexpr):
    """A slice's class ids as rows with 1 in the class's column and 0 in the others."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * PART + tl.arange(0, PART)
    class_id = tl.load(ids + row, row < columns, -1)
    value = tl.where(column[None, :] == class_id[:, None], 1.0, 0.0).to(one_hot.dtype.element_ty)
    place = one_hot + row.to(tl.int64)[:, None] * row_width + column[None, :]
    tl.store(place, value, (row < columns)[:, None] & (column < row_width)[None, :])
