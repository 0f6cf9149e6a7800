"""Notices, on a CPU, where a program would wait for its device if it had one."""

import numbers
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_METHODS = frozenset(
    {
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        Tensor.nonzero,
        Tensor.masked_select,
        Tensor.unique,
        Tensor.equal,
        Tensor.allclose,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.__contains__,
        Tensor.__array__,
        torch.nonzero,
        torch.masked_select,
        torch.unique,
        torch.equal,
        torch.allclose,
        # From the host, and not from pinned memory: this waits as well.
        torch.tensor,
        torch.as_tensor,
        torch.from_numpy,
    }
)
_OPERATORS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::item",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::bincount",
        # Whether they converged.
        "aten::_linalg_svd",
        "aten::_linalg_eigh",
    }
)
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"})


_ON_A_CPU_ALONE = frozenset({"_check_filled", "_check_posterior", "check_range"})
"""Functions of ours that look at values where that costs nothing: they ask what device it is first."""


class HostReads:
    """Collects what was called, as a context manager: both what Python calls and what torch calls by itself."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = (_Functions(self), _Operators(self))
        self._passing_over = False

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    def note(self, name: str) -> None:
        """With the place where it was called, unless only a CPU comes there."""
        stack = traceback.extract_stack()
        if self._passing_over or any(frame.name in _ON_A_CPU_ALONE for frame in stack):
            return
        frame = next(f for f in reversed(stack) if f.filename != __file__ and "/torch/" not in f.filename)
        self.found.append(f"{name} at {frame.filename}:{frame.lineno}")

    @contextmanager
    def passing_over(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        self._passing_over = True
        yield
        self._passing_over = False


class _Functions(TorchFunctionMode):
    """What has no operator on a CPU, such as `tolist`."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function, types, arguments=(), options=None) -> Any:
        options = options or {}
        if function is F.one_hot and len(arguments) + len(options) > 1:
            with self._reads.passing_over():  # it checks ids on a CPU alone
                return function(*arguments, **options)
        if (
            function in _METHODS
            or _goes_to_the_host(function, arguments, options)
            or _writes_a_number_to_an_element(function, arguments)
        ):
            self._reads.note(getattr(function, "__name__", str(function)))
        return function(*arguments, **options)


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, operator, types, arguments=(), options=None) -> Any:
        name = operator._schema.name
        masks = [] if name not in _INDEXING else [t for t in tree_leaves(arguments[1]) if t is not None]
        if name in _OPERATORS or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self._reads.note(name)
        return operator(*arguments, **(options or {}))


def _goes_to_the_host(function, arguments, options) -> bool:
    """By name: `to(other.device)` goes nowhere."""
    named = [given for given in (*arguments[1:], *options.values()) if isinstance(given, str)]
    return function is Tensor.to and "cpu" in named


def _writes_a_number_to_an_element(function, arguments) -> bool:
    """Torch copies it from the host; to a slice it would write it by a kernel."""
    if function is not Tensor.__setitem__ or not isinstance(arguments[2], numbers.Number):
        return False
    return arguments[0][arguments[1]].dim() == 0
