"""`chunked` on a GPU: per slice, the vendor library's products with one Triton kernel between them.

Forward, 4 launches a slice (5 with class ids): both similarities, statistics and weights, class mass, teacher's mean
row. Backward, 4 (3 with class ids): the student's similarities again, class shares, slopes, gradient. And 2 in either
pass for all of it. Half-precision operands go to the matrix units as they are; every product is summed in float32
(float64 where an input is).

All slices share one workspace whose rows lie a power of two of values apart, so that every matrix is aligned for the
library's fast kernels and for 16-byte loads, a last, shorter slice included. Nothing waits for the device, and a CUDA
graph can record it. Offsets into matrices have 64 bits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdav_fast.kernels import triton_chunk as kernels
from kdav_fast.kernels.caller import on_device
from kdav_fast.kernels.records import Saved, Settings
from kdav_fast.kernels.reference import compute_dtype

LEAST_ROWS, MOST_ROWS = 256, 4096
"""Of a slice. A program holds a row of them in registers."""
PART = 1024
"""Columns of a longer row that a program takes at a time."""
ONE_HOT_ROWS, ONE_HOT_PART = 16, 512
"""Rows and columns of a program that writes class ids out."""
HALF = (torch.float16, torch.bfloat16)
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def query_dtype(memory: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of products with U and of `Saved.query`, where sums are in `dtype`."""
    return memory.dtype if memory.dtype in HALF and dtype == torch.float32 else dtype


class Slices:
    """How a memory is cut, what its operands are multiplied in, and the slices' workspace."""

    def __init__(
        self, batch: int, classes: int, dtype: torch.dtype, memory: Tensor, posterior: Tensor, most: int
    ) -> None:
        """`dtype` is that of sums, `most` the workspace's bytes, 0 for three quarters of the L2 cache."""
        self.memory, self.posterior, self.dtype = memory, posterior, dtype
        self.rows_dtype = query_dtype(memory, dtype)
        # float16 is too narrow for a ratio q / p: it is widened.
        narrow = posterior.dtype == torch.bfloat16 and dtype == torch.float32
        self.class_dtype = torch.bfloat16 if narrow else dtype
        if posterior.ndim == 1:
            self.class_dtype = self.rows_dtype
        length = len(memory)
        fit = (most or _most_of_l2(memory.device)) // self._bytes_per_row(batch, memory.shape[1], classes)
        most_rows = max(LEAST_ROWS, min(MOST_ROWS, fit, triton.next_power_of_2(length)))
        self.step = 1 << (most_rows.bit_length() - 1)
        self.starts = range(0, length, self.step)
        self.num_warps = 8 if self.step > 1024 else 4

    def _bytes_per_row(self, batch: int, width: int, classes: int) -> int:
        """Similarities, and what has to be built of weights, U and R."""
        rows, class_rows = self.rows_dtype, self.class_dtype
        built = batch * class_rows.itemsize * (class_rows != rows)
        built += width * rows.itemsize * (rows != self.memory.dtype)
        built += classes * class_rows.itemsize * (class_rows != self.posterior.dtype)
        return 2 * batch * self.dtype.itemsize + built

    def workspace(self, rows: int) -> tuple[Tensor, Tensor]:
        """A matrix of similarities, and the same bytes as one of `rows_dtype` whose rows start where its do."""
        matrix = torch.empty(rows, self.step, dtype=self.dtype, device=self.memory.device)
        return matrix, matrix.view(self.rows_dtype)

    def embeddings(self, start: int) -> Tensor:
        """U of the slice at `start`."""
        return self.memory[start : start + self.step].to(self.rows_dtype)

    def posteriors(self, start: int) -> Tensor:
        """R of it, as probabilities or class ids."""
        rows = self.posterior[start : start + self.step]
        return rows.to(self.class_dtype) if rows.ndim == 2 else rows


def forward(
    student: Tensor,
    teacher: Tensor,
    logits: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Saved]:
    """See `chunked_cpu.forward`; a slice has 256 rows at least."""
    (batch, width), classes, device = student.shape, logits.shape[1], memory.device
    dtype = compute_dtype(student, teacher, logits, memory)
    slices = Slices(batch, classes, dtype, memory, posterior, settings.workspace_bytes)
    student, teacher, logits = student.contiguous(), teacher.contiguous(), logits.contiguous()

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    query = empty(2 * batch, width, dtype=slices.rows_dtype)
    with on_device(device):
        kernels.query_kernel[(2 * batch,)](
            student, teacher, query, batch, width, settings.kappa_student, settings.kappa_teacher,
            DTYPE=TRITON_DTYPE[dtype], BLOCK_D=triton.next_power_of_2(width),
        )  # fmt: skip
        sums = _add_up(slices, query, classes, filled)
        membership_kl, prediction_kl, log_total, above = (empty(batch) for _ in range(4))
        ratio, group, (*_, mass, mean) = empty(batch, classes), _group(classes), sums
        kernels.chunked_divergence_kernel[(batch,)](
            logits, *sums, membership_kl, prediction_kl, log_total, ratio, above,
            batch, classes // group, mass.shape[1], width, settings.temperature, settings.eps,
            DTYPE=TRITON_DTYPE[dtype], GROUP=group, BLOCK_K=PART, PART=PART,
        )  # fmt: skip
    return membership_kl, prediction_kl, Saved(query, log_total, ratio, above, mean)


def _add_up(slices: Slices, query: Tensor, classes: int, filled: Tensor | None) -> tuple[Tensor, ...]:
    """Each row's sums over the memory under its largest similarity m: m, totals, cross, class mass, teacher's."""
    (rows, width), batch = query.shape, len(query) // 2

    def empty(*shape: int, dtype: torch.dtype = slices.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    maximum, total, cross = empty(rows), empty(rows), empty(batch)
    mass, mean = empty(batch, _aligned(classes)), empty(batch, width)
    similarity, weights = slices.workspace(rows)
    if slices.posterior.ndim == 1:
        one_hot = empty(slices.step, _aligned(classes), dtype=slices.class_dtype)
    for start in slices.starts:
        memory, posterior = slices.embeddings(start), slices.posteriors(start)
        columns = len(memory)
        _multiply(similarity[:, :columns], query, memory.T)
        kernels.absorb_kernel[(batch,)](
            similarity, weights, maximum, total, cross, mass, mean, maximum if filled is None else filled,
            start, columns, batch, mass.shape[1], width, MASKED=filled is not None, BLOCK=slices.step,
            WEIGHTS_BLOCK=weights.shape[1], PART=PART, num_warps=slices.num_warps,
        )  # fmt: skip
        if posterior.ndim == 1:
            # A product adds in a fixed order; index_add_ on a GPU does not.
            grid = triton.cdiv(columns, ONE_HOT_ROWS), triton.cdiv(one_hot.shape[1], ONE_HOT_PART)
            kernels.one_hot_kernel[grid](
                posterior, one_hot, columns, one_hot.shape[1], ROWS=ONE_HOT_ROWS, PART=ONE_HOT_PART
            )
            posterior = one_hot[:columns, :classes]
        student_weights = weights[:batch, :columns].to(slices.class_dtype)
        _multiply(mass[:, :classes], student_weights, posterior, add=start > 0)
        _multiply(mean, weights[batch:, :columns], memory, add=start > 0)
    return maximum, total, cross, mass, mean


def backward(
    student: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    saved: Saved,
    membership_grad: Tensor,
    prediction_grad: Tensor,
    settings: Settings,
) -> Tensor:
    """See `chunked_cpu.backward`."""
    (batch, classes), width, dense = saved.ratio.shape, memory.shape[1], posterior.ndim == 2
    slices = Slices(batch, classes, saved.ratio.dtype, memory, posterior, settings.workspace_bytes)
    student = student.contiguous()
    upstream = membership_grad.contiguous(), prediction_grad.contiguous()
    similarity, slopes = slices.workspace(batch)
    offset, grad = torch.empty_like(saved.above), torch.empty_like(saved.teacher_mean)
    ratio = torch.empty_like(saved.ratio, dtype=slices.class_dtype if dense else None)
    share = torch.empty_like(similarity) if dense else ratio
    group = _group(classes)
    with on_device(memory.device):
        kernels.upstream_kernel[(batch,)](
            *upstream, saved.above, saved.ratio, saved.teacher_mean, offset, ratio, grad,
            classes // group, width, settings.temperature, GROUP=group, PART=PART,
        )  # fmt: skip
        for start in slices.starts:
            rows, class_rows = slices.embeddings(start), slices.posteriors(start)
            columns = len(rows)
            _multiply(similarity[:, :columns], saved.query[:batch], rows.T)
            if dense:
                _multiply(share[:, :columns], ratio, class_rows.T)
            kernels.chunked_slope_kernel[(batch,)](
                similarity, share, class_rows, offset, saved.log_total, offset if filled is None else filled,
                start, columns, classes, slopes, DENSE=dense, MASKED=filled is not None, BLOCK=slices.step,
                SLOPE_BLOCK=slopes.shape[1], num_warps=slices.num_warps,
            )  # fmt: skip
            _multiply(grad, slopes[:, :columns], rows, add=True)
        del similarity, slopes, share  # their bytes are not wanted beside the result's
        result = torch.empty_like(student)
        kernels.chunked_gradient_kernel[(batch,)](
            student, grad, *upstream, result, width, settings.kappa_student, settings.temperature,
            DTYPE=TRITON_DTYPE[slices.dtype], BLOCK_D=triton.next_power_of_2(width),
        )  # fmt: skip
    return result


def _group(classes: int) -> int:
    """Of classes that are loaded at once: Triton tells rows aligned where 16 divides K, and 1000 has only 8."""
    return 8 if classes % 8 == 0 else 1


def _aligned(columns: int) -> int:
    """Values between the rows of a matrix of `columns`, so that each row starts at a multiple of 16 bytes."""
    return triton.cdiv(columns, 16) * 16


def _most_of_l2(device: torch.device) -> int:
    """Three quarters, so that a slice is still there for its next pass; of 60 MB where the interpreter is the GPU."""
    size = 60 * 10**6 if device.type != "cuda" else torch.cuda.get_device_properties(device).L2_cache_size
    return size * 3 // 4


def _multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out (+)= left @ right, summed in out's dtype, which may be wider than theirs."""
    if out.device.type == "cpu":  # Triton's interpreter: the library for CPUs has no product that widens
        left, right = left.to(out.dtype), right.to(out.dtype)
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=int(add), out=out)
    elif not add:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif adds_wider(out.device):
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))


@functools.cache
def adds_wider(device: torch.device) -> bool:
    """Whether this torch's `addmm` adds a product of bfloat16 to float32; the first that had `out_dtype` did not."""
    total, ones = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
