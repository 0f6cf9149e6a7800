# ruff: noqa: N803, SIM300  (Triton writes compile-time constants in capitals)
"""The Triton kernels of the objective. None of them writes a matrix of batch x memory length.

Work and bytes at batch 256, width d = 512, memory L = 16384, classes K = 1000, with g = 2 B L d FLOP (4.3 GFLOP):

    membership   both similarities from one tile of U     2 g
    classes      per tile of 512 classes: the student's similarities again, then their product with R;
                 2 tiles: 2 g + 2 B L K = 2 g + 1.95 g
    gradient     both similarities, r = ratio R^T (dense only), slopes @ U     2 g + 1.95 g + g

A block of 64 rows has 64 x K fp32 class sums, 256 KB at K = 1000: as much as the whole register file of a
multiprocessor. So classes are cut into tiles of 512 (half the file) and the student's similarities computed
again for each tile, g more a tile. Writing them instead moves 4 B L bytes out and, for each tile, in again; that
is 50 MB at these shapes, of the order of that g, and a workspace that grows with L. Class ids use the same
product with a one-hot tile built in registers: no bytes of R are read, and no sum depends on the order in
which rows of a class come in. Every kernel splits the memory over programs, as flash-decoding does, and writes
fp32 partial sums; a second kernel adds these in a fixed order, so that two runs agree to the bit.
"""

import triton
import triton.language as tl

# Slopes are at most 2 T^2 before this factor, and float16 has its subnormal numbers from 6e-5 down.
SLOPE_SCALE = tl.constexpr(4096.0)

# The interpreter cuts bfloat16 off where a GPU rounds it to nearest, and its product takes it for integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """x in DTYPE, to nearest."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _dot(a, b, total, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b with operands rounded to DTYPE, summed in float32."""
    a, b = _round(a, DTYPE), _round(b, DTYPE)
    if INTERPRETED and DTYPE == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _inverse_norm(embedding, row, batch, width, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / max(|x|, 1e-12) of each row, as torch.nn.functional.normalize has it."""
    squares = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < batch)[:, None] & (column < width)[None, :]
        values = tl.load(embedding + row[:, None] * width + column[None, :], mask, 0.0).to(tl.float32)
        squares += tl.sum(values * values, 1)
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit
def _split_bounds(filled, length, split, splits, BLOCK_L: tl.constexpr):
    """The used rows of the memory that this split covers: whole tiles, evenly dealt."""
    rows = tl.minimum(tl.load(filled).to(tl.int32), length)
    step = tl.cdiv(tl.cdiv(rows, BLOCK_L), splits) * BLOCK_L
    return split * step, tl.minimum((split + 1) * step, rows)


@triton.jit
def _similarity(
    embedding, memory, row, item, batch, width, end,
    BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x, U_j>, BLOCK_B x BLOCK_L, of embeddings as given: the caller scales by kappa / |x|."""
    result = tl.zeros([BLOCK_B, BLOCK_L], tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < batch)[:, None] & (column < width)[None, :]
        x = tl.load(embedding + row[:, None] * width + column[None, :], mask, 0.0)
        mask = (column < width)[:, None] & (item < end)[None, :]
        u = tl.load(memory + item.to(tl.int64)[None, :] * width + column[:, None], mask, 0.0)
        result = _dot(x, u, result, DTYPE, PRECISION)
    return result


@triton.jit
def _both_similarities(
    student, teacher, memory, row, item, batch, width, end,
    BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_similarity` of student and teacher, which share each tile of U."""
    s = tl.zeros([BLOCK_B, BLOCK_L], tl.float32)
    t = tl.zeros([BLOCK_B, BLOCK_L], tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < batch)[:, None] & (column < width)[None, :]
        offset = row[:, None] * width + column[None, :]
        x = tl.load(student + offset, mask, 0.0)
        y = tl.load(teacher + offset, mask, 0.0)
        mask = (column < width)[:, None] & (item < end)[None, :]
        u = tl.load(memory + item.to(tl.int64)[None, :] * width + column[:, None], mask, 0.0)
        s = _dot(x, u, s, DTYPE, PRECISION)
        t = _dot(y, u, t, DTYPE, PRECISION)
    return s, t


@triton.jit
def membership_kernel(
    student, teacher, memory, filled, partial, inverse_norm,
    batch, length, width, splits, kappa_student, kappa_teacher,
    BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of one split, for a tile of rows.

    Writes partial[0..4, split, row]: the student's maximum and sum, the teacher's maximum and sum, and
    sum exp(t - m_t) (t - s); and inverse_norm[0..1, row] for the backward pass.
    """
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    student_norm = _inverse_norm(student, row, batch, width, BLOCK_B, BLOCK_D)
    teacher_norm = _inverse_norm(teacher, row, batch, width, BLOCK_B, BLOCK_D)
    if split == 0:
        tl.store(inverse_norm + row, student_norm, row < batch)
        tl.store(inverse_norm + batch + row, teacher_norm, row < batch)

    student_max = tl.full([BLOCK_B], float("-inf"), tl.float32)
    teacher_max = tl.full([BLOCK_B], float("-inf"), tl.float32)
    student_sum = tl.zeros([BLOCK_B], tl.float32)
    teacher_sum = tl.zeros([BLOCK_B], tl.float32)
    cross = tl.zeros([BLOCK_B], tl.float32)
    begin, end = _split_bounds(filled, length, split, splits, BLOCK_L)
    for start in range(begin, end, BLOCK_L):
        item = start + tl.arange(0, BLOCK_L)
        used = (item < end)[None, :]
        s, t = _both_similarities(
            student, teacher, memory, row, item, batch, width, end,
            BLOCK_B, BLOCK_L, BLOCK_D, DTYPE, PRECISION,
        )  # fmt: skip
        s = s * (student_norm * kappa_student)[:, None]
        t = t * (teacher_norm * kappa_teacher)[:, None]
        difference = t - s
        s = tl.where(used, s, float("-inf"))
        t = tl.where(used, t, float("-inf"))
        new_max = tl.maximum(student_max, tl.max(s, 1))
        student_sum = student_sum * tl.exp(student_max - new_max) + tl.sum(tl.exp(s - new_max[:, None]), 1)
        student_max = new_max
        new_max = tl.maximum(teacher_max, tl.max(t, 1))
        shrink = tl.exp(teacher_max - new_max)
        weight = tl.exp(t - new_max[:, None])
        teacher_sum = teacher_sum * shrink + tl.sum(weight, 1)
        cross = cross * shrink + tl.sum(weight * difference, 1)
        teacher_max = new_max

    output = partial + split * batch + row
    tl.store(output, student_max, row < batch)
    tl.store(output + splits * batch, student_sum, row < batch)
    tl.store(output + 2 * splits * batch, teacher_max, row < batch)
    tl.store(output + 3 * splits * batch, teacher_sum, row < batch)
    tl.store(output + 4 * splits * batch, cross, row < batch)


@triton.jit
def class_kernel(
    student, memory, posterior, filled, partial, statistics,
    batch, length, width, class_groups, splits, kappa_student,
    BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, DENSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    CLASS_DTYPE: tl.constexpr, CLASS_PRECISION: tl.constexpr,
):  # fmt: skip
    """Class masses of one split, for a tile of rows and a tile of classes.

    Writes partial[split, row, class] = sum_j w_j R_j(class), with w_j = exp(s_j - m) as rounded for the
    product, and statistics[0..1, split, row] = m and sum_j w_j, so that classes share no rounding.
    """
    classes = class_groups * GROUP
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    class_id = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    scale = kappa_student * _inverse_norm(student, row, batch, width, BLOCK_B, BLOCK_D)
    maximum = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    mass = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    begin, end = _split_bounds(filled, length, split, splits, BLOCK_L)
    for start in range(begin, end, BLOCK_L):
        item = start + tl.arange(0, BLOCK_L)
        used = item < end
        s = _similarity(
            student, memory, row, item, batch, width, end, BLOCK_B, BLOCK_L, BLOCK_D, DTYPE, PRECISION
        )
        s = tl.where(used[None, :], s * scale[:, None], float("-inf"))
        new_max = tl.maximum(maximum, tl.max(s, 1))
        weight = _round(tl.exp(s - new_max[:, None]), CLASS_DTYPE)
        if DENSE:
            offset = item.to(tl.int64)[:, None] * classes + class_id[None, :]
            r = tl.load(posterior + offset, used[:, None] & (class_id < classes)[None, :], 0.0)
        else:
            r = tl.where(tl.load(posterior + item, used, -1)[:, None] == class_id[None, :], 1.0, 0.0)
        shrink = tl.exp(maximum - new_max)
        total = total * shrink + tl.sum(weight.to(tl.float32), 1)
        mass = mass * shrink[:, None]
        mass = _dot(weight, r, mass, CLASS_DTYPE, CLASS_PRECISION)
        maximum = new_max

    if tl.program_id(1) == 0:
        tl.store(statistics + split * batch + row, maximum, row < batch)
        tl.store(statistics + (splits + split) * batch + row, total, row < batch)
    output = partial + (split * batch + row).to(tl.int64)[:, None] * classes + class_id[None, :]
    tl.store(output, mass, (row < batch)[:, None] & (class_id < classes)[None, :])


@triton.jit
def divergence_kernel(
    logits, partial, class_partial, class_statistics, membership_kl, prediction_kl, log_total, ratio, above,
    batch, classes, splits, class_splits, temperature, eps,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one row, in order, and forms both divergences and what the backward pass needs.

    log_total[0..1, row] are student's and teacher's log sum exp; ratio[row, y] = q(y) / p(y) and above[row] =
    sum p(y) ratio(y), both over the classes with p(y) >= eps, since the floor draws no gradient. The sum is of
    ratios as they are stored: rounded to bfloat16 or not, the slopes of a row add up to 0.
    """
    row = tl.program_id(0)
    split = tl.arange(0, BLOCK_S)
    source = partial + split * batch + row
    plane = splits * batch
    used = split < splits
    student_max = tl.load(source, used, float("-inf"))
    student_sum = tl.load(source + plane, used, 0.0)
    teacher_max = tl.load(source + 2 * plane, used, float("-inf"))
    teacher_sum = tl.load(source + 3 * plane, used, 0.0)
    cross = tl.load(source + 4 * plane, used, 0.0)
    maximum = tl.max(student_max, 0)
    student_total = maximum + tl.log(tl.sum(student_sum * tl.exp(student_max - maximum), 0))
    maximum = tl.max(teacher_max, 0)
    shrink = tl.exp(teacher_max - maximum)
    teacher_mass = tl.sum(teacher_sum * shrink, 0)
    teacher_total = maximum + tl.log(teacher_mass)
    membership = tl.sum(cross * shrink, 0) / teacher_mass - teacher_total + student_total
    tl.store(membership_kl + row, membership)
    tl.store(log_total + row, student_total)
    tl.store(log_total + batch + row, teacher_total)

    source = class_statistics + split * batch + row
    class_max = tl.load(source, split < class_splits, float("-inf"))
    class_sum = tl.load(source + class_splits * batch, split < class_splits, 0.0)
    maximum = tl.max(class_max, 0)
    class_total = maximum + tl.log(tl.sum(class_sum * tl.exp(class_max - maximum), 0))

    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)
        g = tl.load(logits + row * classes + class_id, class_id < classes, float("-inf")).to(tl.float32)
        best = tl.maximum(best, g)
    best_logit = tl.max(best, 0)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)
        g = tl.load(logits + row * classes + class_id, class_id < classes, float("-inf")).to(tl.float32)
        total += tl.exp((g - best_logit) / temperature)
    logit_total = tl.sum(total, 0)

    prediction = tl.zeros([BLOCK_K], tl.float32)
    above_sum = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, classes, BLOCK_K):
        class_id = start + tl.arange(0, BLOCK_K)
        mask = class_id < classes
        g = tl.load(logits + row * classes + class_id, mask, float("-inf")).to(tl.float32)
        q = tl.exp((g - best_logit) / temperature) / logit_total
        p = tl.zeros([BLOCK_K], tl.float32)
        for index in range(class_splits):
            part = (index * batch + row).to(tl.int64) * classes
            scale = tl.exp(tl.load(class_statistics + index * batch + row) - class_total)
            p += scale * tl.load(class_partial + part + class_id, mask, 0.0)
        floored = tl.where(p < eps, eps, p)  # as torch.clamp: NaN stays NaN
        log_q = tl.where(q == 0, 0.0, tl.log(tl.where(q == 0, 1.0, q)))
        prediction += tl.where(mask, q * (log_q - tl.log(floored)), 0.0)
        weight = _round(tl.where(p >= eps, q, 0.0) / floored, ratio.dtype.element_ty)
        tl.store(ratio + row * classes + class_id, weight, mask)
        above_sum += p * weight.to(tl.float32)
    tl.store(prediction_kl + row, temperature * temperature * tl.sum(prediction, 0))
    tl.store(above + row, tl.sum(above_sum, 0))


@triton.jit
def _upstream(membership_grad, prediction_grad, temperature, row, mask):
    """Upstream gradients of the row brought to a common size, T^2 included, and that size."""
    a = tl.load(membership_grad + row, mask, 0.0)
    b = tl.load(prediction_grad + row, mask, 0.0) * temperature * temperature
    size = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), 1e-30)
    return a / size, b / size, size


@triton.jit
def gradient_kernel(
    student, teacher, memory, posterior, filled, inverse_norm, log_total, ratio, above,
    membership_grad, prediction_grad, partial,
    batch, length, width, class_groups, splits, kappa_student, kappa_teacher, temperature,
    BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr, GROUP: tl.constexpr, DENSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    CLASS_DTYPE: tl.constexpr, CLASS_PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j slope_j U_j of one split, for a tile of rows and BLOCK_W columns of the embedding.

    slope is d loss / d s of DESIGN section 2, times SLOPE_SCALE over the row's upstream size.
    Writes partial[split, row, column].
    """
    classes = class_groups * GROUP
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    output_column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    split = tl.program_id(2)
    mask_b = row < batch
    student_scale = kappa_student * tl.load(inverse_norm + row, mask_b, 0.0)
    teacher_scale = kappa_teacher * tl.load(inverse_norm + batch + row, mask_b, 0.0)
    # Rows beyond the batch would have exp(0 - 0) = 1 for a probability; they are not stored.
    student_total = tl.load(log_total + row, mask_b, 0.0)
    teacher_total = tl.load(log_total + batch + row, mask_b, 0.0)
    a, b, _ = _upstream(membership_grad, prediction_grad, temperature, row, mask_b)
    a, b = a * SLOPE_SCALE, b * SLOPE_SCALE
    offset = a + b * tl.load(above + row, mask_b, 0.0)
    grad = tl.zeros([BLOCK_B, BLOCK_W], tl.float32)
    begin, end = _split_bounds(filled, length, split, splits, BLOCK_L)
    for start in range(begin, end, BLOCK_L):
        item = start + tl.arange(0, BLOCK_L)
        used = item < end
        if DENSE:
            r = tl.zeros([BLOCK_B, BLOCK_L], tl.float32)
            for first in range(0, classes, BLOCK_K):
                class_id = first + tl.arange(0, BLOCK_K)
                mask_k = class_id < classes
                w = tl.load(
                    ratio + row[:, None] * classes + class_id[None, :], mask_b[:, None] & mask_k[None, :], 0.0
                )
                place = item.to(tl.int64)[None, :] * classes + class_id[:, None]
                rows = tl.load(posterior + place, used[None, :] & mask_k[:, None], 0.0)
                r = _dot(w, rows, r, CLASS_DTYPE, CLASS_PRECISION)
        else:
            class_id = tl.load(posterior + item, used, -1)
            known = (class_id >= 0) & (class_id < classes)
            place = ratio + row[:, None] * classes + class_id[None, :]
            r = tl.load(place, mask_b[:, None] & known[None, :], 0.0)
        s, t = _both_similarities(
            student, teacher, memory, row, item, batch, width, end,
            BLOCK_B, BLOCK_L, BLOCK_D, DTYPE, PRECISION,
        )  # fmt: skip
        p = tl.exp(s * student_scale[:, None] - student_total[:, None])
        q = tl.exp(t * teacher_scale[:, None] - teacher_total[:, None])
        slope = p * (offset[:, None] - b[:, None] * r) - a[:, None] * q
        slope = tl.where(used[None, :], slope, 0.0)
        mask = used[:, None] & (output_column < width)[None, :]
        u = tl.load(memory + item.to(tl.int64)[:, None] * width + output_column[None, :], mask, 0.0)
        grad = _dot(slope, u, grad, DTYPE, PRECISION)
    output = partial + (split * batch + row).to(tl.int64)[:, None] * width + output_column[None, :]
    tl.store(output, grad, mask_b[:, None] & (output_column < width)[None, :])


@triton.jit
def embedding_gradient_kernel(
    student, inverse_norm, membership_grad, prediction_grad, partial, grad,
    batch, width, splits, kappa_student, temperature,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one row, in order, and takes the gradient back through the normalisation."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_W)
    mask = column < width
    total = tl.zeros([BLOCK_W], tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * batch + row).to(tl.int64) * width + column, mask, 0.0)
    _, _, size = _upstream(membership_grad, prediction_grad, temperature, row, row < batch)
    norm = tl.load(inverse_norm + row)
    unit = tl.load(student + row * width + column, mask, 0.0).to(tl.float32) * norm
    total = total * (kappa_student * size / SLOPE_SCALE)
    total = (total - unit * tl.sum(unit * total, 0)) * norm
    tl.store(grad + row * width + column, _round(total, grad.dtype.element_ty), mask)
