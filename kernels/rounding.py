# ruff: noqa: N803, SIM300  (Triton writes compile-time constants in capitals)
"""Rounding in Triton kernels, alike on a GPU and under Triton's interpreter."""

import triton
import triton.language as tl

# The interpreter cuts bfloat16 off where a GPU rounds it to nearest.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, to nearest."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
