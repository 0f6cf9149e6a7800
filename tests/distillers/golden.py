"""Golden vectors: published methods' losses and gradients in float64, from their authors' code."""

import os
from pathlib import Path

import numpy as np

from tests.kernels.golden import REPOSITORY

FOLDER = Path(os.environ.get("KDAV_GOLDEN_METHODS", REPOSITORY / "tests" / "golden" / "methods"))
"""Holds `NAME_1.npz`, `NAME_2.npz` and so on; another folder of the same kind may be named instead."""


def golden_cases(method: str) -> list[str]:
    """The cases of a method."""
    return [path.stem for path in sorted(FOLDER.glob(f"{method}_*.npz"))]


def load_golden(case: str) -> dict[str, np.ndarray]:
    """Inputs, settings and truth of a case, by name."""
    with np.load(FOLDER / f"{case}.npz") as archive:
        return dict(archive)
