"""Random numbers without a state: each follows from the integers that name it, so many are drawn at once."""

import numpy as np

# SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): its step, and its output function, which mixes a word's bits.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def stream(seed: int, use: int) -> np.ndarray:
    """The key (one uint64) of what a seed is used for."""
    return np.random.SeedSequence((seed, use)).generate_state(1, np.uint64)


def keys(key: np.ndarray, *indices: np.ndarray | int) -> np.ndarray:
    """A key for every combination of indices (integers from 0 on), which are broadcast against each other."""
    for index in indices:
        key = _mixed(key + _STEP * (np.atleast_1d(index).astype(np.uint64) + np.uint64(1)))
    return key


def words(key: np.ndarray, slots: int) -> np.ndarray:
    """The first `slots` random words of every key: N x slots uint64."""
    return keys(key[:, None], np.arange(slots))


def uniform(key: np.ndarray, slots: int) -> np.ndarray:
    """The first `slots` random numbers of every key, 0..1 (1 excluded): N x slots float64."""
    return (words(key, slots) >> np.uint64(11)) * 2.0**-53


def _mixed(word: np.ndarray) -> np.ndarray:
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        word = (word ^ (word >> shift)) * factor
    return word ^ (word >> _SHIFTS[-1])
