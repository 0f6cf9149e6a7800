"""The largest singular value against a decomposition in float64."""

import pytest
import torch

from kdav_fast.distillers.terms.spectral import largest_singular_value


def both(matrix):
    """Value and gradient: found, and by torch's decomposition."""
    pairs = []
    for norm in (largest_singular_value, lambda m: torch.linalg.matrix_norm(m, ord=2)):
        leaf = matrix.clone().requires_grad_()
        value = norm(leaf)
        value.backward()
        pairs.append((value.detach(), leaf.grad))
    return pairs


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 12), (12, 5), (32, 32), (64, 256)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_value_and_gradient(shape, size):
    matrix = size * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, truth = both(matrix)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gap", [1e-1, 1e-4, 1e-6])
def test_singular_values_next_to_each_other(gap):
    left, right = (
        torch.linalg.qr(
            torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ).Q
        for seed in (0, 1)
    )
    values = torch.tensor([1.0, 1 - gap, 1 - gap, *torch.linspace(0, 0.9, 6)], dtype=torch.float64)
    found, _ = both(left * values @ right)
    torch.testing.assert_close(found[0], torch.ones_like(found[0]), rtol=1e-13, atol=0)
    # d sigma / d M is the outer product of the top singular vectors, known as well as the gap is wide.
    torch.testing.assert_close(found[1], torch.outer(left[:, 0], right[0]), rtol=0, atol=1e-14 / gap)


def test_all_of_them_equal():
    found, _ = both(3 * torch.eye(50, dtype=torch.float64))
    torch.testing.assert_close(found[0], torch.tensor(3.0, dtype=torch.float64), rtol=1e-13, atol=0)


def test_it_is_exact_in_single_precision():
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    value = largest_singular_value(matrix)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), torch.linalg.matrix_norm(matrix.double(), ord=2), rtol=6e-8, atol=0
    )
