"""Which implementation of the loss is fastest, how much memory it takes and how far off it is.

    python benchmarks/loss_kernel.py [--device cpu|cuda] [--preset NAME] [--json FILE] [--plot FILE]

One line a shape, pass and implementation: the median time with 20th and 80th percentiles and the ratio to the roofline
measured in the same run; of forward and backward together also peak extra memory, whether a second call gives the
same bits, and the largest relative error of the gradient against float64 (of the reference in float32 for shapes
where float64 takes too long). The fused implementations get `filled` as a tensor, as in training. The forward pass
alone is timed without a graph. torch.compile takes part at the main shapes of a GPU, where it tunes for a minute each.

What fails has the error's first line instead of figures. Rows are on the disk as soon as all implementations have
been measured in one pass of one shape: the same command goes on from there.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from command_line import Parser, check_device, default_device, draw, positive, result_files
from environment import describe
from record import Record, failure, leave_if_broken
from timing import ceilings, interleaved, once, peak_extra_bytes, warn_if_noisy, widest_spread
from torch import Tensor

from kdav_fast import kdav_loss

SETTINGS = {"kappa_student": 10.0, "kappa_teacher": 10.0, "temperature": 1.0}
PASSES = ("full", "backward", "forward")
WARM_UP = 3
"""Calls: the first compiles, the second records CUDA graphs."""
QUEUED = 20
"""Calls without a pause between them."""


class Shape(NamedTuple):
    """B, d, L, K and the kind of posterior."""

    batch: int
    width: int
    length: int
    classes: int
    posterior: str

    def __str__(self) -> str:
        return f"B{self.batch} d{self.width} L{self.length} K{self.classes} {self.posterior}"


class Preset(NamedTuple):
    shapes: list[Shape]
    compiled: int
    """The first so many also through torch.compile."""


def both(*size: int) -> list[Shape]:
    return [Shape(*size, kind) for kind in ("ids", "dense")]


_DENSE = partial(Shape, posterior="dense")
PRESETS = {
    # Shapes A and Bshape, then sweeps over L and B.
    "cuda": Preset(
        [*both(256, 512, 16384, 1000), *both(1024, 2048, 65536, 1000)]
        + [_DENSE(256, 512, length, 1000) for length in (4096, 65536)]
        + [_DENSE(batch, 512, 16384, 1000) for batch in (64, 1024)],
        compiled=4,
    ),
    # The largest that issues of a CPU are about, then sweeps.
    "cpu": Preset(
        both(256, 512, 65536, 1000)
        + [_DENSE(128, 64, length, 100) for length in (256, 4096, 16384)]
        + [_DENSE(16, 64, 512, 100), _DENSE(32, 64, 4096, 100)],
        compiled=7,
    ),
    "tiny": Preset(both(16, 24, 64, 10), compiled=0),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, memory_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The one set-up: speed, memory and error are all taken on these tensors. The memory's dtype may be another."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if shape.posterior == "ids":
        posterior = torch.randint(shape.classes, (shape.length,), generator=generator, device=device)
    else:
        posterior = torch.softmax(3 * normal(shape.length, shape.classes), dim=1).to(dtype)
    memory = F.normalize(normal(shape.length, shape.width), dim=1)
    student, teacher = normal(shape.batch, shape.width), normal(shape.batch, shape.width)
    logits = 3 * normal(shape.batch, shape.classes)
    tensors = [t.to(dtype) for t in (student, teacher, logits)]
    tensors.append(memory.to(memory_dtype or dtype))
    tensors[0].requires_grad_()
    return [*tensors, posterior]


def eager_terms(
    student: Tensor, teacher: Tensor, logits: Tensor, memory: Tensor, posterior: Tensor
) -> tuple[Tensor, Tensor]:
    """Both terms of every row in plain torch, every operation in the inputs' own dtype."""
    kappa = SETTINGS["kappa_student"]
    log_p = F.log_softmax(kappa * F.normalize(student, dim=1) @ memory.T, dim=1)
    log_q = F.log_softmax(kappa * F.normalize(teacher, dim=1) @ memory.T, dim=1)
    membership = (log_q.exp() * (log_q - log_p)).sum(1)
    if posterior.ndim == 2:
        p_class = log_p.exp() @ posterior
    else:
        p_class = torch.zeros_like(logits).index_add(1, posterior, log_p.exp())
    q_class = torch.softmax(logits, dim=1)
    prediction = (torch.xlogy(q_class, q_class) - q_class * p_class.clamp(min=1e-8).log()).sum(1)
    return membership, prediction


def eager_loss(*tensors: Tensor) -> Tensor:
    """Their sum's mean."""
    membership, prediction = eager_terms(*tensors)
    return (membership + prediction).mean()


class Implementation(NamedTuple):
    dtype: torch.dtype
    """Of the inputs."""
    memory: torch.dtype
    """Of the memory's rows."""
    loss: Callable[..., Tensor]


@cache
def implementations(device: torch.device, compiled: bool) -> dict[str, Implementation]:
    """By name. Fused implementations take what training has: on a GPU bfloat16, with a float16 memory of unit rows."""

    def fused(impl: str) -> Implementation:
        def loss(*tensors: Tensor) -> Tensor:
            # A tensor, as `TeacherMemory.filled` is: its value is unknown to the host.
            return kdav_loss(*tensors, filled_rows(device, len(tensors[3])), **SETTINGS, impl=impl).loss

        return Implementation(fast, torch.float16 if on_gpu else fast, loss)

    on_gpu = device.type == "cuda"
    fast = torch.bfloat16 if on_gpu else torch.float32
    table = {
        "eager fp32": Implementation(
            *(torch.float32, torch.float32),
            lambda *tensors: kdav_loss(*tensors, **SETTINGS, impl="reference").loss,
        ),
        "eager bf16": Implementation(torch.bfloat16, torch.bfloat16, eager_loss),
    }
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one function, all shapes
        tuned = torch.compile(eager_loss, mode="max-autotune" if on_gpu else None, dynamic=False)
        table["compile"] = Implementation(fast, fast, tuned)
    table["chunked"] = fused("chunked")
    return table | ({"triton": fused("triton")} if on_gpu else {})


@cache
def filled_rows(device: torch.device, length: int) -> Tensor:
    return torch.tensor(length, device=device)


def roofline_seconds(
    shape: Shape, dtype: torch.dtype, what: str, rates: dict[str, float]
) -> tuple[float, float]:
    """FLOP that must be done, and the least time for them and for reading each input once a pass.

    Forward: both similarities, and p(y|x) from dense posteriors. Backward that keeps nothing of size B x L:
    both similarities again, r for dense posteriors, and the slopes times U.
    """
    product = 2.0 * shape.batch * shape.length
    dense = product * shape.classes * (shape.posterior == "dense")
    forward, backward = 2 * product * shape.width + dense, 3 * product * shape.width + dense
    flops = {"forward": forward, "backward": backward, "full": forward + backward}[what]
    row = shape.width * dtype.itemsize + (shape.classes * dtype.itemsize if shape.posterior == "dense" else 8)
    passes = 2 if what == "full" else 1
    return flops, max(flops / rates["flops_per_s"], passes * shape.length * row / rates["bytes_per_s"])


def make_pass(loss: Callable[..., Tensor], tensors: list[Tensor], what: str) -> Callable[[], object]:
    """A function of no arguments that runs one pass; the backward pass's graph is built here, untimed."""
    if what == "forward":
        return partial(torch.no_grad()(loss), *tensors)
    if what == "backward":
        value = loss(*tensors)
        return lambda: torch.autograd.grad(value, tensors[0])
    return lambda: torch.autograd.grad(loss(*tensors), tensors[0])


def true_gradient(shape: Shape, inputs: list[Tensor], on_gpu: bool) -> tuple[Tensor, str]:
    """The gradient that all are compared with, and what it was computed in."""
    exact = on_gpu or shape.batch * shape.length <= 2**22
    wide = [t.detach().double() if exact and t.is_floating_point() else t.detach() for t in inputs]
    wide[0].requires_grad_()
    (gradient,) = torch.autograd.grad(kdav_loss(*wide, **SETTINGS, impl="reference").loss, wide[0])
    return gradient.double(), "float64" if exact else "float32 reference"


def look_at(call: Callable[[], tuple[Tensor]], truth: Tensor, device: torch.device) -> dict[str, object]:
    """Besides time: memory, error, and whether a second call gives the same bits."""
    first, second = (call()[0].clone() for _ in range(2))
    figures = {
        "gradient_error": float((first.double() - truth).abs().max() / truth.abs().max()),
        "same_bits_again": torch.equal(first, second),
        "extra_mib": peak_extra_bytes(call, device) / 2**20,
    }
    if device.type == "cuda":
        # Beside `median_s`, which begins on an idle device: what is left once launches overlap the work.
        figures["queued_s"] = once(lambda: lambda: [call() for _ in range(QUEUED)], device) / QUEUED
    return figures


def measure(
    shape: Shape, what: str, compiled: bool, device: torch.device, seconds: float, rates: dict, record: Record
) -> None:
    """One pass of every implementation on one shape, those in turn that are not in the record yet."""
    key = {"shape": str(shape), **shape._asdict(), "pass": what}
    table = {
        name: one
        for name, one in implementations(device, compiled).items()
        if not record.find(shape=str(shape), implementation=name, **{"pass": what})
    }
    if not table:
        return
    exact = (torch.float32, torch.float32)
    kinds = [exact, *(one[:2] for one in table.values())]
    inputs = {kind: make_inputs(shape, kind[0], device, kind[1]) for kind in kinds}
    whole = what == "full"
    truth, against = true_gradient(shape, inputs[exact], device.type == "cuda") if whole else (None, "")
    makers, figures = {}, {}
    for name, one in table.items():
        make = partial(make_pass, one.loss, inputs[one[:2]], what)
        try:
            with record.attempt(f"{shape} {what} {name}"):
                for _ in range(WARM_UP):
                    make()()
                seen = look_at(make(), truth, device) | {"error_against": against} if whole else {}
                once(make, device)  # an error of the device shows here at the latest
        except Exception as error:  # whatever a compiler or the device raises costs this one only
            print(f"{shape!s:38}{what:9}{name:11} failed: {failure(error)}", flush=True)
            record.add({**key, "implementation": name, "error": failure(error)})
            leave_if_broken(error)
            continue
        makers[name], figures[name] = make, seen
    rows = []
    for name, times in interleaved(makers, device, seconds).items() if makers else ():
        dtype = table[name].dtype
        flops, floor = roofline_seconds(shape, dtype, what, rates[str(dtype)])
        median = times["median_s"]
        row = {**key, "implementation": name, **times, "tflops": flops / median / 1e12}
        row |= {"roofline_s": floor, "times_roofline": median / floor, **figures[name]}
        rows.append(row)
        print(
            f"{shape!s:38}{what:9}{name:11}{median * 1e3:9.3f} ms "
            f"[{times['p20_s'] * 1e3:.3f}, {times['p80_s'] * 1e3:.3f}] "
            f"{row['tflops']:8.3f} TFLOP/s {row['times_roofline']:6.2f}x roofline",
            flush=True,
        )
    record.add(*rows)


def plot(rows: list[dict], environment: dict, path: Path) -> None:
    """Time of forward and backward together, and peak extra memory, by shape and implementation."""
    import matplotlib.pyplot as plt

    full = [row for row in rows if row["pass"] == "full" and "median_s" in row]
    names = list(dict.fromkeys(row["shape"] for row in full))
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.5 + 0.75 * len(names)), sharey=True)
    kinds = list(dict.fromkeys(row["implementation"] for row in full))
    for axis, key, scale, label in (
        (axes[0], "median_s", 1e3, "forward + backward (ms), bars: 20th to 80th percentile"),
        (axes[1], "extra_mib", 1.0, "peak extra memory (MiB)"),
    ):
        for index, kind in enumerate(kinds):
            chosen = [row for row in full if row["implementation"] == kind]
            places = [
                names.index(row["shape"]) + (index - len(kinds) / 2 + 0.5) * 0.8 / len(kinds)
                for row in chosen
            ]
            spread = None
            if key == "median_s":
                low = [(row["median_s"] - row["p20_s"]) * scale for row in chosen]
                spread = [low, [(row["p80_s"] - row["median_s"]) * scale for row in chosen]]
            values = [row[key] * scale for row in chosen]
            axis.barh(places, values, 0.8 / len(kinds), xerr=spread, label=kind)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend()
    versions = environment["versions"]
    figure.suptitle(f"{environment['device']}, {environment['threads']} threads, torch {versions['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_table(rows: list[dict]) -> None:
    """Forward and backward together, in microseconds: the last lines, for whoever sees only those."""
    print(
        f"{'forward and backward':38}{'':11}{'us':>10}{'queued':>10}{'roofline':>10}{'times':>8}{'error':>10}"
    )
    for row in (row for row in rows if row["pass"] == "full"):
        begin = f"{row['shape']:38}{row['implementation']:11}"
        if "error" in row:
            print(f"{begin} {row['error']}")
            continue
        queued = f"{1e6 * row['queued_s']:10.1f}" if "queued_s" in row else f"{'-':>10}"
        print(
            f"{begin}{1e6 * row['median_s']:10.1f}{queued}{1e6 * row['roofline_s']:10.1f}"
            f"{row['times_roofline']:8.2f}{row['gradient_error']:10.1e}"
            f"{'' if row['same_bits_again'] else '  other bits the second time'}"
        )


def run(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    device = check_device(options.device)
    path, picture = result_files(options, "loss_kernel")
    name = options.preset or device.type
    preset = PRESETS[name]
    code = ("kernels", "benchmarks/loss_kernel.py", "benchmarks/timing.py")
    environment = describe(device, code=code)
    print(json.dumps(environment, indent=1))

    def derive(rows: list[dict]) -> dict[str, Any]:
        return {"noise": widest_spread(rows)}

    record = Record(path, environment, {"preset": name, "seconds": options.seconds}, derive)
    rates = record.keep("ceilings", lambda: rates_of(device, options.seconds))
    for what in ("full", "others"):
        for index, shape in enumerate(preset.shapes):
            print(f"[{index + 1}/{len(preset.shapes)}] {shape}", flush=True)
            for one in PASSES[:1] if what == "full" else PASSES[1:]:
                measure(shape, one, index < preset.compiled, device, options.seconds, rates, record)
    result = record.write()
    draw(partial(plot, record.rows, environment, picture))
    print_table(record.rows)
    warn_if_noisy(result["noise"])


def rates_of(device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Of the device, by dtype, for as long as a pass of a shape is measured."""
    return {
        str(dtype): ceilings(device, dtype, min(1.0, seconds)) for dtype in (torch.float32, torch.bfloat16)
    }


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--preset", choices=tuple(PRESETS), help="shapes (those of the device)")
    add("--seconds", type=positive(float), default=1.0, help="for one pass of one shape, all implementations")
    add("--json", type=Path, help="result (benchmarks/results/loss_kernel_DEVICE.json)")
    add("--plot", type=Path, help="picture (beside the result)")
    parser.run(run)


if __name__ == "__main__":
    main()
