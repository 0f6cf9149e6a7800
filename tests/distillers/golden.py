"""Golden vectors: published methods' losses and gradients in float64, from their authors' code."""

import numpy as np

from tests.kernels.golden import REPOSITORY

FOLDER = REPOSITORY.parent / "shared" / "golden" / "methods"
"""Beside the repository where they are at hand."""


def golden_cases(method: str) -> list[str]:
    """The cases of a method; none where they are not at hand."""
    return [path.stem for path in sorted(FOLDER.glob(f"{method}_*.npz"))]


def load_golden(case: str) -> dict[str, np.ndarray]:
    """Inputs, settings and truth of a case, by name."""
    with np.load(FOLDER / f"{case}.npz") as archive:
        return dict(archive)
