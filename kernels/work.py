"""What a pass over the device costs, from its work, bytes and launches: the units of the cost model.

Units: FLOP, bytes, microseconds. B, d, L, K as in DESIGN section 2, and g = 2 B L d FLOP.
"""

import math
from typing import NamedTuple

HALF, FLOAT = 2, 4
"""Bytes of a bfloat16 and of a float32 value."""


class Machine(NamedTuple):
    """What the predictions assume; the defaults are for an H200 and its host."""

    flops: float = 790e12
    """FLOP/s of large bfloat16 products (measured there, DESIGN section 5)."""
    hbm: float = 4.3e12
    """Bytes/s of a large copy (measured there, DESIGN section 5)."""
    l2: float = 5.5e12
    """Bytes/s from L2 to all multiprocessors (assumed)."""
    l2_size: float = 60e6
    """Tensors over half of it come from HBM (assumed)."""
    multiprocessors: int = 132
    launch: float = 2.5
    """Of one kernel after another in a stream: start, first loads, last stores (assumed)."""
    latency: float = 0.7
    """Of a load that nothing hides: a pipeline that runs empty (assumed)."""
    torch_host: float = 5.0
    """Of the host for one torch operation that launches one kernel (assumed)."""
    triton_host: float = 12.0
    """Of the host for one launch of a Triton kernel through its JIT function (assumed)."""
    python: float = 100.0
    """Of the host for a call of `kdav_loss` and its backward pass without launches (assumed)."""


H200 = Machine()


class Shape(NamedTuple):
    """B, d, L, K and whether R is given as class ids."""

    batch: int
    width: int
    length: int
    classes: int
    ids: bool

    @property
    def pairs(self) -> int:
        """B x L."""
        return self.batch * self.length

    @property
    def g(self) -> float:
        """FLOP of one product of similarities."""
        return 2.0 * self.pairs * self.width

    @property
    def class_work(self) -> float:
        """FLOP of one product with a dense R."""
        return 2.0 * self.pairs * self.classes


SHAPES = {
    "A ids": Shape(256, 512, 16384, 1000, True),
    "A dense": Shape(256, 512, 16384, 1000, False),
    "Bshape ids": Shape(1024, 2048, 65536, 1000, True),
    "Bshape dense": Shape(1024, 2048, 65536, 1000, False),
}


class Pass(NamedTuple):
    """One kernel, run `times` times."""

    name: str
    flops: float = 0.0
    """Of its matrix products."""
    slots: float = 0.0
    """FLOP that the matrix units could have done meanwhile: more than `flops` for narrow instructions and for
    multiprocessors that stand idle in the last wave."""
    l2: float = 0.0
    """Bytes between L2 and the multiprocessors."""
    hbm: float = 0.0
    """Bytes between HBM and L2."""
    unhidden: float = 0.0
    """Microseconds of latency that nothing hides."""
    times: int = 1
    triton: bool = False

    def device_time(self, machine: Machine = H200) -> float:
        """Microseconds on the device, launches included."""
        slowest = max(self.slots / machine.flops, self.l2 / machine.l2, self.hbm / machine.hbm)
        return self.times * (slowest * 1e6 + self.unhidden + machine.launch)

    def host_time(self, machine: Machine = H200) -> float:
        """Microseconds on the host."""
        return self.times * (machine.triton_host if self.triton else machine.torch_host)


def instruction_rate(columns: int) -> float:
    """Share of the matrix unit's rate that Hopper's 64 x `columns` x 16 instruction reaches.

    It takes columns / 2 cycles at full rate; its operands, 2 KB and 32 bytes a column from shared memory at 128
    bytes a cycle, take 16 + columns / 4. (Operands in registers are free of that, but not of the narrow ones' latency.)
    """
    return min(1.0, 2 * columns / (64 + columns))


def product(
    name: str,
    rows: int,
    columns: int,
    depth: int,
    *,
    out: int = HALF,
    times: int = 1,
    add: bool = False,
    machine: Machine = H200,
) -> Pass:
    """[rows x depth] @ [depth x columns] in bfloat16 by the vendor's library.

    Tiles of 128 x 256 or, at 85 % of their rate, 128 x 128; where they leave multiprocessors idle the depth may be
    split, and the partial sums are written and read in float32. The quickest of these is taken. That tiles fetch their
    operands again from L2 is part of the measured rate.

    Args:
        out: bytes of a value of the result.
        add: whether the result is added to what is there.
    """
    result = rows * columns
    once = HALF * depth * (rows + columns) + out * result * (1 + add)
    choices = []
    for width, rate in ((256, 1.0), (128, 0.85)):
        tiles = math.ceil(rows / 128) * math.ceil(columns / width)
        for splits in {1, max(1, min(machine.multiprocessors // tiles, depth // 512))}:
            waves = math.ceil(tiles * splits / machine.multiprocessors)
            slots = waves * machine.multiprocessors * 2.0 * 128 * width * math.ceil(depth / splits) / rate
            partial = 2 * FLOAT * result * splits * (splits > 1)
            choices.append((slots, once + partial))
    slots, l2 = min(choices, key=lambda choice: max(choice[0] / machine.flops, choice[1] / machine.l2))
    flops = 2.0 * result * depth
    return Pass(name, flops, slots, l2, beyond_l2(once, machine), times=times)


def beyond_l2(size: float, machine: Machine = H200) -> float:
    """Those of `size` bytes that one pass moves from or to HBM: all of them if half of L2 cannot hold them."""
    return size if size > machine.l2_size / 2 else 0.0


def rowwise(name: str, moved: float, tensors: float, *, times: int = 1, triton: bool = False) -> Pass:
    """An elementwise pass or reduction that moves `moved` bytes of tensors that take `tensors` bytes together."""
    return Pass(name, l2=moved, hbm=moved if beyond_l2(tensors) else 0.0, times=times, triton=triton)
