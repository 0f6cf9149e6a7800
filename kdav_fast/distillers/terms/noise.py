"""Random numbers of an image at a step: the same on whichever rank it is, after a restart, and beside any others.

A generator's depend on what was drawn before. These are a hash of what they are for, by the finaliser of SplitMix64
(Steele, Lea, Flood 2014).
"""

import math

import torch
from torch import Tensor

_BITS = 24
_STEP, _STREAM, _PLACE = 0x9E3779B97F4A7C15 - 2**64, 0x632BE59BD9B4E019, 0x2545F4914F6CDD1D
_SEED = 0x5851F42D4C957F2D


def normal_rows(index: Tensor, seed: int, step: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, B x `shape`, float32.

    Args:
        index: B int64, the images.
        seed: of the run.
        step: of the run.
        stream: which of several draws for an image at a step.
        shape: of an image's.
    """
    bits = _bits(index, seed, step, stream, math.prod(shape))
    low, high = bits & (2**_BITS - 1), (bits >> 32) & (2**_BITS - 1)
    radius = (-2 * ((low + 1).float() / 2**_BITS).log()).sqrt()
    return (radius * torch.cos(high.float() * (2 * math.pi / 2**_BITS))).view(-1, *shape)


def whole_rows(index: Tensor, seed: int, step: int, stream: int, end: int) -> Tensor:
    """Whole numbers of 0 .. end - 1, B int64. Arguments are those of `normal_rows`."""
    return (_bits(index, seed, step, stream, 1)[:, 0] & (2**62 - 1)) % end


def _bits(index: Tensor, seed: int, step: int, stream: int, count: int) -> Tensor:
    """B x `count` int64 of random bits; products wrap around."""
    key = index
    for number, factor in ((seed, _SEED), (step, _STEP), (stream, _STREAM)):
        key = _mixed(key + number * factor % 2**63)
    return _mixed(key[:, None] + _PLACE * torch.arange(count, device=index.device))


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30 & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & (2**33 - 1))
