# ruff: noqa: N803  (Triton writes compile-time constants in capitals)
"""The fused passes over similarities that a matrix product has written, and the small kernels around them.

Similarities (cosines: kappa is multiplied in where they are read) lie memory row by memory row, L x 2 rows: the
student's batch, then the teacher's, each padded to `rows`, a multiple of 16, so that loads are of whole vectors. The
rows of a class are then as cheap to read as neighbouring ones, and a class's mass is a sum of rows in a fixed order: no
atomics, no one-hot product, no difference of running sums.
"""

import triton
import triton.language as tl

from kdav_fast.kernels.rounding import rounded

# Slopes are at most 2 T^2 before this factor, and float16 has its subnormal numbers from 6e-5 down.
SLOPE_SCALE = tl.constexpr(4096.0)


@triton.jit
def _inverse_norm(x):
    """1 / max(|x|, 1e-12), as torch.nn.functional.normalize has it."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)


@triton.jit
def unit_kernel(student, teacher, unit, batch, rows, width, BLOCK_D: tl.constexpr):
    """One row of unit, 2 rows x width: x / |x| of the student's rows, then of the teacher's; zeros for padding."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    place = row % rows
    source = place.to(tl.int64) * width + column
    mask = (column < width) & (place < batch)
    if row < rows:
        x = tl.load(student + source, mask, 0.0).to(tl.float32)
    else:
        x = tl.load(teacher + source, mask, 0.0).to(tl.float32)
    x = rounded(x * _inverse_norm(x), unit.dtype.element_ty)
    tl.store(unit + row.to(tl.int64) * width + column, x, column < width)


@triton.jit
def _used_rows(filled, length, MASKED: tl.constexpr):
    used = length
    if MASKED:
        used = tl.minimum(tl.load(filled).to(tl.int32), length)
    return used


@triton.jit
def _class_ids(ids, item, used, classes):
    """Class ids of these rows; `classes` for rows that are not in use or are of no class."""
    found = tl.load(ids + item, used, -1).to(tl.int32)
    return tl.where((found >= 0) & (found < classes), found, classes)


@triton.jit
def class_counts_kernel(
    ids, filled, counts, length, classes, chunks,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """counts[class, chunk]: how many of a chunk of BLOCK rows are of each class."""
    chunk = tl.program_id(0)
    item = chunk * BLOCK + tl.arange(0, BLOCK)
    found = _class_ids(ids, item, item < _used_rows(filled, length, MASKED), classes)
    class_id = tl.arange(0, BINS)
    tl.store(counts + class_id * chunks + chunk, tl.histogram(found, BINS), class_id < classes)


@triton.jit
def class_order_kernel(
    ids, filled, counts, ends, order, starts, length, classes, chunks,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Writes each row of a chunk to its place in the order: after those of its class in earlier chunks and in its own.

    ends is the running sum of counts, class by class; starts[class] is what it is before the class.
    """
    chunk = tl.program_id(0)
    item = chunk * BLOCK + tl.arange(0, BLOCK)
    used_rows = _used_rows(filled, length, MASKED)
    found = _class_ids(ids, item, item < used_rows, classes)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, PART):
        other = chunk * BLOCK + first + tl.arange(0, PART)
        same = _class_ids(ids, other, other < used_rows, classes)[None, :] == found[:, None]
        rank += tl.sum((same & (other[None, :] < item[:, None])).to(tl.int32), 1)
    kept = found < classes
    cell = found * chunks + chunk
    place = tl.load(ends + cell, kept, 0) - tl.load(counts + cell, kept, 0) + rank
    tl.store(order + place, item, kept)
    for first in range(chunk * BLOCK, classes + 1, chunks * BLOCK):
        class_id = first + tl.arange(0, BLOCK)
        inside = class_id <= classes
        start = tl.load(ends + class_id * chunks - 1, inside & (class_id > 0), 0)
        tl.store(starts + class_id, start, inside)


@triton.jit
def maximum_kernel(
    similarity, filled, maximum, length, rows, step,
    MASKED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """maximum[part, column]: the largest cosine of `step` rows of the memory."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = column < 2 * rows
    end = tl.minimum((part + 1) * step, _used_rows(filled, length, MASKED))
    best = tl.full([BLOCK_L, BLOCK_B], float("-inf"), tl.float32)
    for start in range(part * step, end, BLOCK_L):
        item = start + tl.arange(0, BLOCK_L)
        offset = item.to(tl.int64)[:, None] * (2 * rows) + column[None, :]
        s = tl.load(similarity + offset, (item < end)[:, None] & mask[None, :], float("-inf"))
        best = tl.maximum(best, s.to(tl.float32))
    tl.store(maximum + part * (2 * rows) + column, tl.max(best, 0), mask)


@triton.jit
def _ceiling(
    kappa, maximum, column, mask, rows, parts,
    BOUNDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """What is taken off s = kappa cos before exp: kappa itself, or the largest s of each of these columns."""
    if BOUNDED:
        return tl.zeros([BLOCK_B], tl.float32) + kappa
    part = tl.arange(0, BLOCK_P)
    offset = part[:, None] * (2 * rows) + column[None, :]
    best = tl.load(maximum + offset, (part < parts)[:, None] & mask[None, :], float("-inf"))
    return kappa * tl.max(best, 0)


@triton.jit
def membership_kernel(
    similarity, maximum, filled, order, starts, partial, weights,
    length, rows, parts, step, maximum_parts, kappa_student, kappa_teacher,
    IDS: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Both softmaxes' sums over a part of the memory: with class ids one of `step` pieces of a class, else `step` rows.

    partial[0..2, part, row] are sum p', sum q' and sum q' (t - s), with p' = exp(s - its ceiling) and q' that of the
    teacher. Dense: weights[item, row] = p' as the product with R takes it, and partial[3] is their sum, so that the
    class probabilities add up to 1.
    """
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = column < rows
    student_top = _ceiling(
        kappa_student, maximum, column, mask, rows, maximum_parts, BOUNDED, BLOCK_P, BLOCK_B
    )
    teacher_top = _ceiling(
        kappa_teacher, maximum + rows, column, mask, rows, maximum_parts, BOUNDED, BLOCK_P, BLOCK_B
    )
    used_rows = _used_rows(filled, length, MASKED)
    if IDS:
        first = tl.load(starts + part // step).to(tl.int32)
        last = tl.load(starts + part // step + 1).to(tl.int32)
        piece = tl.cdiv(last - first, step)
        begin = first + part % step * piece
        end = tl.minimum(begin + piece, last)
    else:
        begin = part * step
        end = tl.minimum(begin + step, length)

    student_sum = tl.zeros([BLOCK_L, BLOCK_B], tl.float32)
    teacher_sum = tl.zeros([BLOCK_L, BLOCK_B], tl.float32)
    cross = tl.zeros([BLOCK_L, BLOCK_B], tl.float32)
    class_sum = tl.zeros([BLOCK_L, BLOCK_B], tl.float32)
    for start in range(begin, end, BLOCK_L):
        place = start + tl.arange(0, BLOCK_L)
        inside = place < end
        item = place
        if IDS:
            item = tl.load(order + place, inside, 0).to(tl.int32)
        used = (inside & (item < used_rows))[:, None] & mask[None, :]
        offset = item.to(tl.int64)[:, None] * (2 * rows) + column[None, :]
        s = tl.load(similarity + offset, used, 0.0).to(tl.float32) * kappa_student
        t = tl.load(similarity + rows + offset, used, 0.0).to(tl.float32) * kappa_teacher
        p = tl.where(used, tl.exp(s - student_top[None, :]), 0.0)
        q = tl.where(used, tl.exp(t - teacher_top[None, :]), 0.0)
        student_sum += p
        teacher_sum += q
        cross += q * (t - s)
        if not IDS:
            weight = rounded(p, weights.dtype.element_ty)
            class_sum += weight.to(tl.float32)
            target = weights + item.to(tl.int64)[:, None] * rows + column[None, :]
            tl.store(target, weight, inside[:, None] & mask[None, :])

    output = partial + column
    tl.store(output + part.to(tl.int64) * rows, tl.sum(student_sum, 0), mask)
    tl.store(output + (part + parts).to(tl.int64) * rows, tl.sum(teacher_sum, 0), mask)
    tl.store(output + (part + 2 * parts).to(tl.int64) * rows, tl.sum(cross, 0), mask)
    if not IDS:
        tl.store(output + (part + 3 * parts).to(tl.int64) * rows, tl.sum(class_sum, 0), mask)


@triton.jit
def _sum_of_parts(
    partial, plane: tl.constexpr, row, mask, rows, parts, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr
):
    """partial[plane, 0..parts, row] added up, always in the same order."""
    total = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
    for start in range(0, parts, BLOCK_K):
        part = start + tl.arange(0, BLOCK_K)
        offset = (part + plane * parts).to(tl.int64)[:, None] * rows + row[None, :]
        total += tl.load(partial + offset, (part < parts)[:, None] & mask[None, :], 0.0)
    return tl.sum(total, 0)


@triton.jit
def divergence_kernel(
    logits, maximum, partial, mass, loss, membership_kl, prediction_kl, log_total, ratio, shift, above,
    batch, rows, classes, parts, pieces, maximum_parts, kappa_student, kappa_teacher,
    temperature, eps, weight_membership, weight_prediction,
    IDS: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Both divergences of a few rows, their weighted sum, and what the backward pass needs.

    mass[class * pieces + 0.., row] is the unnormalised class probability. log_total[0..1, row] are student's and
    teacher's log sum exp; ratio[class, row] = q(y) / p(y) and above[row] = sum p(y) ratio(y), both over the classes
    with p(y) >= eps, since the floor draws no gradient. The sum is of ratios as they are stored: rounded to bfloat16
    or not, the slopes of a row add up to 0. Dense: the product that gives r_j adds shift[row] = -above[row] before it
    rounds, so that what it rounds is small where slopes are, and above[row] is what shift, rounded itself, leaves.
    """
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < rows
    given = row < batch
    student_sum = _sum_of_parts(partial, 0, row, inside, rows, parts, BLOCK_K, BLOCK_B)
    teacher_sum = _sum_of_parts(partial, 1, row, inside, rows, parts, BLOCK_K, BLOCK_B)
    cross = _sum_of_parts(partial, 2, row, inside, rows, parts, BLOCK_K, BLOCK_B)
    class_total = student_sum
    if not IDS:
        class_total = _sum_of_parts(partial, 3, row, inside, rows, parts, BLOCK_K, BLOCK_B)
    student_total = tl.log(student_sum) + _ceiling(
        kappa_student, maximum, row, inside, rows, maximum_parts, BOUNDED, BLOCK_P, BLOCK_B
    )
    teacher_total = tl.log(teacher_sum) + _ceiling(
        kappa_teacher, maximum + rows, row, inside, rows, maximum_parts, BOUNDED, BLOCK_P, BLOCK_B
    )
    membership = cross / teacher_sum - teacher_total + student_total
    tl.store(log_total + row, student_total, inside)
    tl.store(log_total + rows + row, teacher_total, inside)

    source = logits + row.to(tl.int64)[None, :] * classes
    best = tl.full([BLOCK_K, BLOCK_B], float("-inf"), tl.float32)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)[:, None]
        g = tl.load(source + class_id, (class_id < classes) & given[None, :], float("-inf")).to(tl.float32)
        best = tl.maximum(best, g)
    # A row of padding has no logits: 0 keeps its sums finite.
    best_logit = tl.where(given, tl.max(best, 0), 0.0)
    total = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)[:, None]
        g = tl.load(source + class_id, (class_id < classes) & given[None, :], float("-inf")).to(tl.float32)
        total += tl.exp((g - best_logit[None, :]) / temperature)
    logit_total = tl.where(given, tl.sum(total, 0), 1.0)

    prediction = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
    above_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)[:, None]
        mask = (class_id < classes) & inside[None, :]
        g = tl.load(source + class_id, (class_id < classes) & given[None, :], float("-inf")).to(tl.float32)
        q = tl.exp((g - best_logit[None, :]) / temperature) / logit_total[None, :]
        p = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
        for piece in range(pieces):
            offset = (class_id * pieces + piece).to(tl.int64) * rows + row[None, :]
            p += tl.load(mass + offset, mask, 0.0)
        p = p / class_total[None, :]
        floored = tl.where(p < eps, eps, p)  # as torch.clamp: NaN stays NaN
        log_q = tl.where(q == 0, 0.0, tl.log(tl.where(q == 0, 1.0, q)))
        prediction += tl.where(mask, q * (log_q - tl.log(floored)), 0.0)
        weight = rounded(tl.where(p >= eps, q, 0.0) / floored, ratio.dtype.element_ty)
        tl.store(ratio + class_id.to(tl.int64) * rows + row[None, :], weight, mask)
        above_sum += p * weight.to(tl.float32)
    divergence = temperature * temperature * tl.sum(prediction, 0)
    total_above = tl.sum(above_sum, 0)
    if not IDS:
        stored = rounded(-total_above, shift.dtype.element_ty)
        tl.store(shift + row, stored, inside)
        total_above += stored.to(tl.float32)
    tl.store(above + row, total_above, inside)
    tl.store(membership_kl + row, membership, given)
    tl.store(prediction_kl + row, divergence, given)
    tl.store(loss + row, weight_membership * membership + weight_prediction * divergence, given)


@triton.jit
def _upstream(grad, stride, weight_membership, weight_prediction, temperature, row, mask):
    """Upstream gradients of both terms brought to a common size, T^2 included, and that size."""
    g = tl.load(grad + row * stride, mask, 0.0)
    a = g * weight_membership
    b = g * weight_prediction * temperature * temperature
    size = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), 1e-30)
    return a / size, b / size, size


@triton.jit
def similarity_gradient_kernel(
    similarity, filled, posterior, share, log_total, above, grad, slope,
    batch, length, rows, classes, grad_stride, kappa_student, kappa_teacher,
    temperature, weight_membership, weight_prediction,
    IDS: tl.constexpr, MASKED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """slope[item, row] = d loss / d s (DESIGN section 2), times SLOPE_SCALE over the row's upstream size.

    share[.., row] is r = sum_y ratio(y) R(y), shifted, of each item, or with class ids the ratio of its class.
    """
    item = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = column < rows
    a, b, _ = _upstream(
        grad, grad_stride, weight_membership, weight_prediction, temperature, column, column < batch
    )
    a, b = a * SLOPE_SCALE, b * SLOPE_SCALE
    offset = a + b * tl.load(above + column, mask, 0.0)
    used = item < _used_rows(filled, length, MASKED)
    source = item
    if IDS:
        source = tl.load(posterior + item, used, -1).to(tl.int32)
        used = used & (source >= 0) & (source < classes)
    both = used[:, None] & mask[None, :]
    r = tl.load(share + source.to(tl.int64)[:, None] * rows + column[None, :], both, 0.0).to(tl.float32)
    place = item.to(tl.int64)[:, None] * (2 * rows) + column[None, :]
    s = tl.load(similarity + place, both, 0.0).to(tl.float32) * kappa_student
    t = tl.load(similarity + rows + place, both, 0.0).to(tl.float32) * kappa_teacher
    p = tl.exp(s - tl.load(log_total + column, mask, 0.0)[None, :])
    q = tl.exp(t - tl.load(log_total + rows + column, mask, 0.0)[None, :])
    value = tl.where(both, p * (offset[None, :] - b[None, :] * r) - a[None, :] * q, 0.0)
    target = slope + item.to(tl.int64)[:, None] * rows + column[None, :]
    tl.store(target, rounded(value, slope.dtype.element_ty), (item < length)[:, None] & mask[None, :])


@triton.jit
def embedding_gradient_kernel(
    student, grad, query_gradient, result,
    width, grad_stride, kappa_student, temperature, weight_membership, weight_prediction,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Takes one row of the gradient, sum_j slope_j U_j, back through kappa, the normalisation and the common size."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    mask = column < width
    place = row.to(tl.int64) * width + column
    x = tl.load(student + place, mask, 0.0).to(tl.float32)
    total = tl.load(query_gradient + place, mask, 0.0)
    _, _, size = _upstream(
        grad, grad_stride, weight_membership, weight_prediction, temperature, row, row >= 0
    )
    norm = _inverse_norm(x)
    unit = x * norm
    total = (total - unit * tl.sum(unit * total, 0)) * (norm * (kappa_student * size / SLOPE_SCALE))
    tl.store(result + place, rounded(total, result.dtype.element_ty), mask)
