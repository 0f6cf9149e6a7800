"""What the passes of `chunked` are told, and what its forward pass hands to the backward pass."""

from typing import NamedTuple

from torch import Tensor


class Settings(NamedTuple):
    """Numbers that both passes compute with."""

    kappa_student: float
    kappa_teacher: float
    temperature: float
    eps: float
    workspace_bytes: int
    """Most that a slice may take; 0 stands for the device's default."""


class Saved(NamedTuple):
    """Nothing of it grows with L. In the dtype of sums unless said otherwise."""

    query: Tensor
    """kappa * unit embedding of the student's rows, then the teacher's, in that of products with U; 2B x d."""
    log_total: Tensor
    """log sum exp of the student's similarities, B."""
    ratio: Tensor
    """q / p by class, 0 below the floor; B x K."""
    above: Tensor
    """Q, the sum of q over the classes above the floor; B."""
    teacher_mean: Tensor
    """sum_j q(v=j | x) U_j, B x d."""
