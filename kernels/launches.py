"""What the implementations launch: their own code is run with kernels that only note their arguments.

So what is compiled ahead of time is what a training step launches, with what Triton makes of the arguments' values: an
argument that is 1 or None is a constant, and one that 16 divides is told apart.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdav_fast.kernels import chunked_gpu, triton_chunk, triton_kdav, triton_kernels
from kdav_fast.kernels.records import Settings

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Launch(NamedTuple):
    """One kernel as Triton specialises it. Tuples, so that equal ones are known as such and processes can pass them."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    """Type by argument; "constexpr" for constants."""
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    """Places of the arguments that 16 divides."""
    options: tuple[tuple[str, int], ...]
    """num_warps and the like."""


def specialise(module: str, kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """The `Launch` that Triton makes of a call of the `kernel` of `module`."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    signature, constants, divisible = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        plain = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (plain and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            # The device's allocator gives addresses that 256 divides.
            if value.storage_offset() * value.itemsize % 16 == 0:
                divisible.append(place)
        elif plain:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(place)
        else:
            signature[name] = "fp32"
    parts = (signature.items(), constants.items(), divisible, sorted(options.items()))
    return Launch(module, kernel.__name__, *map(tuple, parts))


class _Noting:
    def __init__(self, module: str, kernel: Any, noted: list[Launch]) -> None:
        self.module, self.kernel, self.noted = module, kernel, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            self.noted.append(specialise(self.module, self.kernel, args, named))

        return launch


@contextmanager
def noted_launches(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Inside, the kernels of these modules do nothing but add to the list."""
    noted: list[Launch] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    ]
    for module, name, kernel in kernels:
        setattr(module, name, _Noting(module.__name__, kernel, noted))
    try:
        yield noted
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


class Case(NamedTuple):
    """A call of the loss: B, d, L, K, the inputs' dtype, the posterior's kind, and whether `filled` is a tensor."""

    name: str
    batch: int
    width: int
    length: int
    classes: int
    dtype: str
    ids: bool
    masked: bool

    def inputs(self) -> list[Tensor]:
        """z, t, g, U, R without values: no product has to be computed."""
        dtype = DTYPES[self.dtype]
        b, d, n, k = self.batch, self.width, self.length, self.classes
        posterior = ((n,), torch.int64) if self.ids else ((n, k), dtype)
        tensors = [*((shape, dtype) for shape in ((b, d), (b, d), (b, k), (n, d))), posterior]
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in tensors]

    @property
    def filled(self) -> Tensor | None:
        """As training has it, or None."""
        return torch.tensor(self.length, device="meta") if self.masked else None


def cases() -> Iterator[Case]:
    """Training's shapes with a masked memory, for every dtype and kind of posterior; a whole memory; odd shapes."""
    for ids in (False, True):
        for dtype in DTYPES:
            yield Case("masked", 256, 512, 8192, 1000, dtype, ids, True)
        yield Case("odd", 33, 507, 4096 + 1543, 1001, "bf16", ids, True)
    yield Case("whole", 256, 512, 8192, 1000, "bf16", True, False)
    yield Case("one", 1, 64, 1, 8, "bf16", True, True)


class _WithoutProducts(TorchDispatchMode):
    """Passes over products whose sums are wider than their factors: of tensors without values torch has none."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            return kwargs["out"]
        return function(*args, **kwargs)


def chunked_launches(case: Case) -> None:
    """`chunked`'s passes, forward and backward."""
    student, teacher, logits, memory, posterior = case.inputs()
    settings, filled = Settings(10.0, 10.0, 2.0, 1e-8, 0), case.filled
    with _WithoutProducts():
        *terms, saved = chunked_gpu.forward(student, teacher, logits, memory, posterior, filled, settings)
        chunked_gpu.backward(student, memory, posterior, filled, saved, *terms, settings)


def fused_launches(case: Case) -> None:
    """`triton`'s kernels, forward and backward, with concentrations that bound similarities and with larger ones."""
    inputs, filled = case.inputs(), case.filled
    bound = triton_kdav.LARGEST_BOUND
    for kappa in (bound, 2 * bound) if case.name == "masked" else (bound,):
        numbers = triton_kdav.Settings(kappa, kappa, 1.0, 1e-8, 1.0, 1.0)
        loss, _, _, *saved = triton_kdav.launch_forward(*inputs, filled, None, None, *numbers)
        student, _, _, memory, posterior = inputs
        upstream = torch.ones((), device="meta").expand_as(loss)
        triton_kdav.launch_backward(
            upstream, student, memory, posterior, filled, *saved, *numbers[:3], *numbers[4:]
        )


IMPLEMENTATIONS: dict[str, tuple[Callable[[Case], None], ModuleType]] = {
    "chunked": (chunked_launches, triton_chunk),
    "triton": (fused_launches, triton_kernels),
}
"""What runs the launches of a case, and where its kernels are."""


@functools.cache
def all_launches() -> Mapping[Launch, str]:
    """Every launch of every case, once, with what it was met in first."""
    found: dict[Launch, str] = {}
    for run, module in IMPLEMENTATIONS.values():
        for case in cases():
            with noted_launches(module) as noted:
                run(case)
            for launch in noted:
                kind = "ids" if case.ids else "dense"
                found.setdefault(launch, f"{case.dtype} {kind} {case.name}")
    return found
