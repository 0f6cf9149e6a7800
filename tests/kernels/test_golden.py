"""Every implementation against the golden vectors, values and gradients."""

import numpy as np
import pytest
import torch

from kdav_fast import kdav_loss

from .golden import CASES, FOLDERS, load_case
from .inputs import DEVICE

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def relative_error(measured: torch.Tensor, truth: np.ndarray) -> float:
    """Largest difference as a share of the largest true magnitude (absolute where all of truth is 0)."""
    scale = np.abs(truth).max()
    return float(np.abs(measured.double().cpu().numpy() - truth).max() / (scale if scale > 0 else 1.0))


def check_case(name, dtype, impl, filled_as=int):
    tensors, filled, settings, truth = load_case(name, dtype)
    student, *rest = [tensor.to(DEVICE) for tensor in tensors]
    student.requires_grad_()
    out = kdav_loss(student, *rest, filled_as(filled), **settings, impl=impl)
    out.loss.backward()
    tolerance = TOLERANCE[dtype]
    assert relative_error(out.loss.detach(), truth["loss"]) <= tolerance
    assert relative_error(out.membership_kl, truth["membership_kl"]) <= tolerance
    assert relative_error(out.prediction_kl, truth["prediction_kl"]) <= tolerance
    assert relative_error(student.grad, truth["grad_student_embedding"]) <= tolerance


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("filled_as", [int, torch.tensor])
@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_values_and_gradient(name, dtype, impl, filled_as):
    check_case(name, dtype, impl, filled_as)


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, "triton") for name in sorted(CASES)),
        # torch.compile takes long: one case stands for the others in `make test`.
        *(
            pytest.param(name, "compile", marks=() if name == "case5" else pytest.mark.slow)
            for name in sorted(CASES)
        ),
    ],
)
def test_values_and_gradient_of_compiled_implementations(name, impl):
    check_case(name, torch.float32, impl)


def test_the_repository_brings_its_own_cases():
    assert {"case1", "case2", "case5"} <= {path.stem for path in FOLDERS[0].glob("case*.npz")}
