"""`chunked` on a GPU: per slice, the vendor library's products with one Triton kernel between them.

Forward, 4 launches a slice (5 with class ids): both similarities, statistics and weights, class mass, teacher's mean
row. Backward, 4 (3 with class ids): the student's similarities again, class shares, slopes, gradient. Half-precision
operands go to the matrix units as they are; every product is summed in float32 (float64 where an input is).

All slices share one workspace whose rows lie a power of two of values apart, so that every matrix is aligned for the
library's fast kernels and for 16-byte loads, a last, shorter slice included. Nothing waits for the device, and a CUDA
graph can record it. Offsets into matrices have 64 bits.
"""

import functools

import torch
import triton
from torch import Tensor

from kdav_fast.kernels import triton_chunk
from kdav_fast.kernels.caller import on_device
from kdav_fast.kernels.chunked_cpu import Sums

LEAST_ROWS, MOST_ROWS = 256, 4096
"""Of a slice. A program of the statistics kernel holds a row of them in registers."""
SLOPE_PART = 1024
"""Columns of a program of the slope kernel."""
SCALE_PART = 1024
"""Columns that the statistics kernel scales at a time."""
ONE_HOT_ROWS, ONE_HOT_PART = 16, 512
"""Rows and columns of a program that writes class ids out."""
HALF = (torch.float16, torch.bfloat16)


class Slices:
    """How a memory is cut, and what its operands are multiplied in."""

    def __init__(
        self, batch: int, classes: int, dtype: torch.dtype, memory: Tensor, posterior: Tensor, most: int
    ) -> None:
        """`dtype` is that of sums, `most` the workspace's bytes, 0 for half of the L2 cache."""
        self.memory, self.posterior, self._dtype = memory, posterior, dtype
        widest = torch.float32
        self.rows_dtype = memory.dtype if memory.dtype in HALF and dtype == widest else dtype
        # float16 is too narrow for a ratio q / p: it is widened.
        narrow = posterior.dtype == torch.bfloat16 and dtype == widest
        self.class_dtype = torch.bfloat16 if narrow else dtype
        if posterior.ndim == 1:
            self.class_dtype = self.rows_dtype
        length = len(memory)
        fit = (most or _half_of_l2(memory.device)) // self._bytes_per_row(batch, memory.shape[1], classes)
        most_rows = max(LEAST_ROWS, min(MOST_ROWS, fit, triton.next_power_of_2(length)))
        self.step = 1 << (most_rows.bit_length() - 1)
        self.starts = range(0, length, self.step)

    def _bytes_per_row(self, batch: int, width: int, classes: int) -> int:
        """Similarities, their weights, and what has to be built of U and R."""
        rows, class_rows = self.rows_dtype, self.class_dtype
        weights = 2 * batch * rows.itemsize * (rows != self._dtype)
        weights += batch * class_rows.itemsize * (class_rows != rows)
        built = width * rows.itemsize * (rows != self.memory.dtype)
        built += classes * class_rows.itemsize * (class_rows != self.posterior.dtype)
        return 2 * batch * self._dtype.itemsize + weights + built

    def workspace(self, batch: int) -> tuple[Tensor, Tensor]:
        """Two matrices of 2 `batch` rows, of sums' dtype and of `rows_dtype`: the same one if these are equal."""
        sums = torch.empty(2 * batch, self.step, dtype=self._dtype, device=self.memory.device)
        same = self.rows_dtype == self._dtype
        return sums, sums if same else torch.empty_like(sums, dtype=self.rows_dtype)

    def embeddings(self, start: int) -> Tensor:
        """U of the slice at `start`."""
        return self.memory[start : start + self.step].to(self.rows_dtype)

    def posteriors(self, start: int) -> Tensor:
        """R of it, as probabilities or class ids."""
        rows = self.posterior[start : start + self.step]
        return rows.to(self.class_dtype) if rows.ndim == 2 else rows


def add_up(
    student_query: Tensor,
    teacher_query: Tensor,
    classes: int,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    workspace_bytes: int,
) -> Sums:
    """See `chunked_cpu.add_up`; a slice has 256 rows at least."""
    (batch, width), dtype, device = student_query.shape, student_query.dtype, memory.device
    slices = Slices(batch, classes, dtype, memory, posterior, workspace_bytes)
    similarity, weights = slices.workspace(batch)
    queries = torch.empty(2 * batch, width, dtype=slices.rows_dtype, device=device)
    queries[:batch].copy_(student_query)
    queries[batch:].copy_(teacher_query)
    maximum = torch.full((2 * batch,), -torch.inf, dtype=dtype, device=device)
    total, cross = torch.zeros(3 * batch, dtype=dtype, device=device).split([2 * batch, batch])
    mass = torch.zeros(batch, _aligned(classes), dtype=dtype, device=device)
    mean = torch.zeros(batch, _aligned(width), dtype=dtype, device=device)
    class_mass, teacher_mean = mass[:, :classes], mean[:, :width]
    if posterior.ndim == 1:
        one_hot = torch.empty(slices.step, _aligned(classes), dtype=slices.class_dtype, device=device)
    with on_device(device):
        for start in slices.starts:
            rows, class_rows = slices.embeddings(start), slices.posteriors(start)
            columns = len(rows)
            _multiply(similarity[:, :columns], queries, rows.T)
            triton_chunk.absorb_kernel[(batch,)](
                similarity, weights, maximum, total, cross, mass, mean, maximum if filled is None else filled,
                start, columns, batch, mass.shape[1], mean.shape[1],
                MASKED=filled is not None, BLOCK=slices.step, PART=SCALE_PART,
                num_warps=8 if slices.step > 1024 else 4,
            )  # fmt: skip
            if class_rows.ndim == 1:
                # A product adds in a fixed order; index_add_ on a GPU does not.
                triton_chunk.one_hot_kernel[
                    (triton.cdiv(columns, ONE_HOT_ROWS), triton.cdiv(one_hot.shape[1], ONE_HOT_PART))
                ](class_rows, one_hot, columns, one_hot.shape[1], ROWS=ONE_HOT_ROWS, PART=ONE_HOT_PART)
                class_rows = one_hot[:columns, :classes]
            _multiply(class_mass, weights[:batch, :columns].to(slices.class_dtype), class_rows, add=True)
            _multiply(teacher_mean, weights[batch:, :columns], rows, add=True)
    return Sums(maximum, total, class_mass, teacher_mean, cross)


def add_slopes(
    grad: Tensor,
    student_query: Tensor,
    memory: Tensor,
    posterior: Tensor,
    filled: Tensor | None,
    log_total: Tensor,
    offset: Tensor,
    minus_ratio: Tensor,
    workspace_bytes: int,
) -> None:
    """See `chunked_cpu.add_slopes`."""
    batch, classes = minus_ratio.shape
    slices = Slices(batch, classes, grad.dtype, memory, posterior, workspace_bytes)
    dense = posterior.ndim == 2
    sums, slopes = slices.workspace(batch)
    similarity, share, slopes = sums[:batch], sums[batch:], slopes[:batch]
    query = student_query.to(slices.rows_dtype)
    ratio = minus_ratio.to(slices.class_dtype) if dense else minus_ratio
    part = min(slices.step, SLOPE_PART)
    with on_device(memory.device):
        for start in slices.starts:
            rows, class_rows = slices.embeddings(start), slices.posteriors(start)
            columns = len(rows)
            _multiply(similarity[:, :columns], query, rows.T)
            if dense:
                _multiply(share[:, :columns], ratio, class_rows.T)
            triton_chunk.slope_kernel[(batch, slices.step // part)](
                similarity, share if dense else ratio, class_rows, offset, log_total,
                offset if filled is None else filled, start, columns, classes, slopes,
                DENSE=dense, MASKED=filled is not None, BLOCK=slices.step, PART=part,
            )  # fmt: skip
            _multiply(grad, slopes[:, :columns], rows, add=True)


def _aligned(columns: int) -> int:
    """Values between the rows of a matrix of `columns`, so that each row starts at a multiple of 16 bytes."""
    return triton.cdiv(columns, 16) * 16


def _half_of_l2(device: torch.device) -> int:
    """So that a slice is still there for its next pass; of 60 MB where Triton's interpreter stands in for a GPU."""
    if device.type != "cuda":
        return 30 * 10**6
    return torch.cuda.get_device_properties(device).L2_cache_size // 2


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
