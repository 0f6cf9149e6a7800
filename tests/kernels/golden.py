"""Golden vectors: the objective computed in float64 by an independent program."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
# The small cases are part of the repository; the large ones stand beside it where they are at hand.
FOLDERS = [REPOSITORY / "tests" / "golden", REPOSITORY.parent / "shared" / "golden"]
CASES = {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("case*.npz"))}
TENSORS = ["student_embedding", "teacher_embedding", "teacher_logits", "memory_embedding", "memory_posterior"]
SETTINGS = ["kappa_student", "kappa_teacher", "temperature", "weight_membership", "weight_prediction"]


def load_case(
    name: str, dtype: torch.dtype
) -> tuple[list[Tensor], int, dict[str, float], dict[str, np.ndarray]]:
    """Inputs in `dtype` (class ids stay int64), `filled`, the loss's settings, and the whole archive."""
    with np.load(CASES[name]) as archive:
        case = dict(archive)
    tensors = [torch.from_numpy(case[key]) for key in TENSORS]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    return tensors, int(case["filled"]), {key: float(case[key]) for key in SETTINGS}, case
