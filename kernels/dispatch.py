"""The implementations by name, and which of them `impl="auto"` takes."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdav_fast.kernels.caller import only_unchanged
from kdav_fast.kernels.chunked import chunked_terms
from kdav_fast.kernels.reference import reference_terms

Terms = Callable[..., tuple[Tensor, ...]]
Posterior = Literal["dense", "ids"]


@functools.cache
def _compiled_reference() -> Terms:
    return torch.compile(reference_terms)


def compiled_terms(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """`reference_terms` through torch.compile; the first call with new shapes takes the time to compile."""
    terms = _compiled_reference()(*args, **settings)
    only_unchanged(terms, tuple(arg for arg in args if isinstance(arg, Tensor)))
    return terms


def fused_terms(*args: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_kdav.triton_terms`; Triton is imported here because not every system without a GPU has it."""
    from kdav_fast.kernels.triton_kdav import triton_terms

    return triton_terms(*args, **settings)


IMPLEMENTATIONS: dict[str, Terms] = {
    "reference": reference_terms,
    "chunked": chunked_terms,
    "triton": fused_terms,
    "compile": compiled_terms,
}


class Rule(NamedTuple):
    """One line of the table: where all of its conditions hold, `name` is taken."""

    device: str
    name: str
    reason: str
    dtypes: tuple[torch.dtype, ...] | None = None
    largest_similarities: int | None = None
    """Of batch x length."""


# The CPU lines were measured (benchmarks/results/loss_kernel_cpu.json): the reference is ahead at batch x length
# 2^19 and below; chunked is level with it or ahead at 2^21 (two machines), and ahead by 5 to 14 % at 2^24, in a fifth
# of its memory.
# torch.compile is faster than both, but takes long to compile and memory that grows with L, so that only the user
# picks it.
# The CUDA lines were NOT measured: no GPU was at hand. They follow from counts of work and bytes (cost.py): the fused
# kernels do 3 units of 2 B L d FLOP in a handful of launches, chunked does 5, in 10 or more launches a slice; but they
# keep similarities of student and teacher for the backward pass, and memory is the user's: 64 MiB, not more.
TABLE = (
    Rule(
        "cuda",
        "triton",
        "batch x length <= 2^24 in half precision: similarities are computed once and kept, 64 MiB at most (by "
        "analysis, not measured)",
        dtypes=(torch.float16, torch.bfloat16),
        largest_similarities=2**24,
    ),
    Rule(
        "cuda",
        "triton",
        "batch x length <= 2^23 in float32: similarities are computed once and kept, 64 MiB at most (by analysis, "
        "not measured)",
        dtypes=(torch.float32,),
        largest_similarities=2**23,
    ),
    Rule("cuda", "chunked", "matrix products by cuBLAS, memory bounded (by analysis, not measured)"),
    Rule(
        "cpu",
        "reference",
        "batch x length <= 2^20: it takes fewer calls and its memory is still small (measured)",
        largest_similarities=2**20,
    ),
    Rule(
        "cpu",
        "chunked",
        "batch x length > 2^20: not slower than the reference, and memory bounded (measured)",
    ),
)


def explain_choice(
    device: torch.device | str,
    batch: int,
    width: int,
    length: int,
    classes: int,
    dtype: torch.dtype,
    posterior: Posterior,
) -> tuple[str, str]:
    """The implementation that `impl="auto"` takes for these inputs, and why.

    Args:
        device: of the tensors.
        batch, width, length, classes: B, d, L, K of DESIGN section 2.
        dtype: of the memory's embeddings; float64 if any input is.
        posterior: "dense" class probabilities or class "ids". Neither it nor d or K decides anything so far.
    """
    kind = torch.device(device).type
    for rule in TABLE:
        fits = (
            rule.device == kind
            and (rule.dtypes is None or dtype in rule.dtypes)
            and (rule.largest_similarities is None or batch * length <= rule.largest_similarities)
        )
        if fits:
            return rule.name, rule.reason
    return "chunked", f"memory bounded; nothing was measured on {kind!r}"


def choose(student: Tensor, teacher: Tensor, logits: Tensor, memory: Tensor, posterior: Tensor) -> str:
    """`explain_choice` for tensors."""
    wide = any(tensor.dtype == torch.float64 for tensor in (student, teacher, logits, memory))
    dtype = torch.float64 if wide else memory.dtype
    kind: Posterior = "dense" if posterior.ndim == 2 else "ids"
    name, _ = explain_choice(student.device, *student.shape, memory.shape[0], logits.shape[1], dtype, kind)
    return name
