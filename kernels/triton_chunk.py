# ruff: noqa: N803  (Triton writes compile-time constants in capitals)
"""The chunked objective on a GPU between the library's matrix products.

The rows of a slice's similarities lie BLOCK values apart, a power of two. So a kernel loads and stores whole rows of
BLOCK without a mask, 16 bytes at a time, whatever part of the slice is in use: `tl.where` takes what is not in use
out, and no later product reads it. Weights and slopes are written over the similarities that they are made of,
rounded to the operands' dtype, at the start of the same row; a program has read its row by then.
"""

import triton
import triton.language as tl

from kdav_fast.kernels.rounding import rounded

SLOPE_SCALE = tl.constexpr(4096.0)
"""Upstream gradients are brought to this size while slopes are summed: float16 neither over- nor underflows."""


@triton.jit
def _inverse_norm(x):
    """1 / max(|x|, 1e-12), as torch.nn.functional.normalize has it."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)


@triton.jit
def query_kernel(
    student,
    teacher,
    query,
    batch,
    width,
    kappa_student,
    kappa_teacher,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """kappa x / |x| of one row of the student's embeddings or, after them, of the teacher's."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    if row < batch:
        x = tl.load(student + row * width + column, column < width, 0.0).to(DTYPE)
        x = x * (kappa_student * _inverse_norm(x))
    else:
        x = tl.load(teacher + (row - batch) * width + column, column < width, 0.0).to(DTYPE)
        x = x * (kappa_teacher * _inverse_norm(x))
    tl.store(query + row * width + column, rounded(x, query.dtype.element_ty), column < width)


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
    similarity, weights, maximum, total, cross, mass, mean, filled, start, columns, batch, mass_width, width,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, WEIGHTS_BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adds one slice to the softmax statistics of one row of student and teacher; the first slice begins them.

    Reads the similarities s and t of the row once and writes exp(s - m), exp(t - m) with m the maxima so far.
    Where a maximum grows, the row's earlier sums, taken under the old one, shrink: totals, class mass, mean row.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < _in_use(columns, filled, start, MASKED)
    s = tl.where(here, tl.load(similarity + row * BLOCK + column), float("-inf"))
    t = tl.where(here, tl.load(similarity + (batch + row) * BLOCK + column), float("-inf"))
    first = start == 0
    student_old = tl.where(first, float("-inf"), tl.load(maximum + row))
    teacher_old = tl.where(first, float("-inf"), tl.load(maximum + batch + row))
    student_max = tl.maximum(student_old, tl.max(s, 0))
    teacher_max = tl.maximum(teacher_old, tl.max(t, 0))
    p, q = tl.exp(s - student_max), tl.exp(t - teacher_max)
    tl.debug_barrier()
    tl.store(weights + row * WEIGHTS_BLOCK + column, rounded(p, weights.dtype.element_ty))
    tl.store(weights + (batch + row) * WEIGHTS_BLOCK + column, rounded(q, weights.dtype.element_ty))

    student_shrink, teacher_shrink = tl.exp(student_old - student_max), tl.exp(teacher_old - teacher_max)
    student_total = tl.where(first, 0.0, tl.load(total + row) * student_shrink)
    teacher_total = tl.where(first, 0.0, tl.load(total + batch + row) * teacher_shrink)
    difference = tl.where(first, 0.0, tl.load(cross + row) * teacher_shrink)
    tl.store(maximum + row, student_max)
    tl.store(maximum + batch + row, teacher_max)
    tl.store(total + row, student_total + tl.sum(p, 0))
    tl.store(total + batch + row, teacher_total + tl.sum(q, 0))
    tl.store(cross + row, difference + tl.sum(tl.where(here, q * (t - s), 0.0), 0))
    # Seldom after the first slices. The first one's products begin those sums.
    if (start > 0) & (student_shrink != 1.0):
        _scale_row(mass + row * mass_width, mass_width, student_shrink, PART)
    if (start > 0) & (teacher_shrink != 1.0):
        _scale_row(mean + row * width, width, teacher_shrink, PART)


@triton.jit
def chunked_divergence_kernel(
    logits, maximum, total, cross, mass, mean, membership_kl, prediction_kl, log_total, ratio, above,
    batch, class_groups, mass_width, width, temperature, eps,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Both divergences of one row from its sums over the whole memory, and what the backward pass needs.

    log_total[row]: log sum exp s; ratio[row, y] = q(y) / p(y) and above[row] = sum q(y), both over the classes with
    p(y) >= eps, since the floor draws no gradient; the mean row is divided by its total.
    """
    row = tl.program_id(0).to(tl.int64)
    classes = class_groups * GROUP
    student_total, teacher_total = tl.load(total + row), tl.load(total + batch + row)
    student_log = tl.load(maximum + row) + tl.log(student_total)
    teacher_log = tl.load(maximum + batch + row) + tl.log(teacher_total)
    tl.store(membership_kl + row, tl.load(cross + row) / teacher_total - teacher_log + student_log)
    tl.store(log_total + row, student_log)
    _scale_row(mean + row * width, width, 1.0 / teacher_total, PART)

    best = tl.full([BLOCK_K], float("-inf"), DTYPE)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)
        g = tl.load(logits + row * classes + class_id, class_id < classes, float("-inf")).to(DTYPE)
        best = tl.maximum(best, g)
    best_logit = tl.max(best, 0)
    sums = tl.zeros([BLOCK_K], DTYPE)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)
        g = tl.load(logits + row * classes + class_id, class_id < classes, float("-inf")).to(DTYPE)
        sums += tl.exp((g - best_logit) / temperature)
    logit_total = tl.sum(sums, 0)

    prediction = tl.zeros([BLOCK_K], DTYPE)
    above_sum = tl.zeros([BLOCK_K], DTYPE)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)
        known = class_id < classes
        g = tl.load(logits + row * classes + class_id, known, float("-inf")).to(DTYPE)
        q = tl.exp((g - best_logit) / temperature) / logit_total
        p = tl.load(mass + row * mass_width + class_id, known, 0.0) / student_total
        floored = tl.where(p < eps, eps, p)  # as torch.clamp: NaN stays NaN
        log_q = tl.where(q == 0, 0.0, tl.log(tl.where(q == 0, 1.0, q)))
        prediction += tl.where(known, q * (log_q - tl.log(floored)), 0.0)
        counted = tl.where(known & (p >= eps), q, 0.0)
        above_sum += counted
        tl.store(ratio + row * classes + class_id, counted / floored, known)
    tl.store(prediction_kl + row, temperature * temperature * tl.sum(prediction, 0))
    tl.store(above + row, tl.sum(above_sum, 0))


@triton.jit
def _upstream(membership_grad, prediction_grad, temperature, row):
    """A row's upstream gradients brought to SLOPE_SCALE, T^2 included, and what brings them back."""
    a = tl.load(membership_grad + row)
    b = tl.load(prediction_grad + row) * (temperature * temperature)
    size = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), 1e-30) / SLOPE_SCALE
    return a / size, b / size, size


@triton.jit
def upstream_kernel(
    membership_grad, prediction_grad, above, ratio, mean, offset, minus_ratio, grad,
    class_groups, width, temperature, GROUP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """What one row's slopes are made of, offset and -b ratio, and its gradient's part in the teacher: -a mean."""
    row = tl.program_id(0).to(tl.int64)
    classes = class_groups * GROUP
    a, b, _ = _upstream(membership_grad, prediction_grad, temperature, row)
    tl.store(offset + row, a + b * tl.load(above + row))
    for start in range(0, classes, PART):
        class_id = start + tl.arange(0, PART)
        value = tl.load(ratio + row * classes + class_id, class_id < classes) * -b
        place = minus_ratio + row * classes + class_id
        tl.store(place, rounded(value, minus_ratio.dtype.element_ty), class_id < classes)
    for start in range(0, width, PART):
        column = start + tl.arange(0, PART)
        value = tl.load(mean + row * width + column, column < width)
        tl.store(grad + row * width + column, value * -a, column < width)


@triton.jit
def chunked_slope_kernel(
    similarity, share, ids, offset, log_total, filled, start, columns, classes, slope,
    DENSE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, SLOPE_BLOCK: tl.constexpr,
):  # fmt: skip
    """exp(s - log_total) * (offset + share) of one row: its slopes in a slice, the teacher's part left out.

    `share` is a matrix like `similarity` (DENSE), or has a value a class, which `ids` looks up.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
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
    tl.debug_barrier()  # every thread has read its part of the row
    tl.store(slope + row * SLOPE_BLOCK + column, rounded(value, slope.dtype.element_ty))


@triton.jit
def chunked_gradient_kernel(
    student, grad, membership_grad, prediction_grad, result, width, kappa, temperature,
    DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of the gradient in the query, taken back through kappa, the normalisation and the upstream's scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    x = tl.load(student + row * width + column, column < width, 0.0).to(DTYPE)
    total = tl.load(grad + row * width + column, column < width, 0.0)
    _, _, size = _upstream(membership_grad, prediction_grad, temperature, row)
    scale = _inverse_norm(x)
    unit = x * scale
    total = (total - unit * tl.sum(unit * total, 0)) * (kappa * size * scale)
    tl.store(result + row * width + column, rounded(total, result.dtype.element_ty), column < width)


@triton.jit
def one_hot_kernel(ids, one_hot, columns, row_width, ROWS: tl.constexpr, PART: tl.constexpr):
    """A slice's class ids as rows with 1 in the class's column and 0 in the others."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * PART + tl.arange(0, PART)
    class_id = tl.load(ids + row, row < columns, -1)
    value = tl.where(column[None, :] == class_id[:, None], 1.0, 0.0).to(one_hot.dtype.element_ty)
    place = one_hot + row.to(tl.int64)[:, None] * row_width + column[None, :]
    tl.store(place, value, (row < columns)[:, None] & (column < row_width)[None, :])
