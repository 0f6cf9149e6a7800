"""Which implementation of the loss is fastest, how much memory it takes and how far off it is.

    python benchmarks/loss_kernel.py [--device cpu|cuda] [--json FILE] [--plot FILE]

One line a shape, pass and implementation: the median time with 20th and 80th percentiles, peak extra memory, the
rate achieved, the ratio to the roofline measured in the same run, and the largest relative error of the gradient
against float64 (of the reference in float32 for shapes where float64 takes too long).
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from command_line import Parser, check_device, default_device, positive, result_files
from environment import describe
from timing import ceilings, interleaved, peak_extra_bytes, warn_if_noisy, widest_spread
from torch import Tensor

from kdav_fast import kdav_loss
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole

SETTINGS = {"kappa_student": 10.0, "kappa_teacher": 10.0, "temperature": 1.0}
PASSES = ("forward", "backward", "full")


class Shape(NamedTuple):
    """B, d, L, K and the kind of posterior."""

    batch: int
    width: int
    length: int
    classes: int
    posterior: str

    def __str__(self) -> str:
        return f"B{self.batch} d{self.width} L{self.length} K{self.classes} {self.posterior}"


def shapes(device: torch.device) -> list[Shape]:
    """Shapes A and Bshape on a GPU, the largest one of issue size on a CPU; sweeps over L and B."""
    if device.type == "cuda":
        main = [(256, 512, 16384, 1000), (1024, 2048, 65536, 1000)]
        sweep = [(256, 512, length, 1000) for length in (4096, 65536)]
        sweep += [(batch, 512, 16384, 1000) for batch in (64, 1024)]
        return [Shape(*s, kind) for s in main for kind in ("dense", "ids")] + [
            Shape(*s, "dense") for s in sweep
        ]
    sweep = [(256, 512, 65536, 1000), (128, 64, 256, 100), (128, 64, 4096, 100), (128, 64, 16384, 100)]
    sweep += [(16, 64, 512, 100), (32, 64, 4096, 100)]
    return [Shape(256, 512, 65536, 1000, "ids"), *(Shape(*s, "dense") for s in sweep)]


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The one set-up: speed, memory and error are all taken on these tensors."""
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
    tensors = [t.to(dtype) for t in (student, teacher, logits, memory)]
    tensors[0].requires_grad_()
    return [*tensors, posterior]


def eager_loss(student: Tensor, teacher: Tensor, logits: Tensor, memory: Tensor, posterior: Tensor) -> Tensor:
    """The objective in plain torch, every operation in the inputs' own dtype."""
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
    return (membership + prediction).mean()


def implementations(device: torch.device) -> dict[str, tuple[torch.dtype, Callable[..., Tensor]]]:
    """Name -> dtype of the inputs and the loss. Fused implementations take bfloat16 on a GPU, float32 on a CPU."""

    def by(impl: str) -> Callable[..., Tensor]:
        return lambda *tensors: kdav_loss(*tensors, **SETTINGS, impl=impl).loss

    on_gpu = device.type == "cuda"
    fast = torch.bfloat16 if on_gpu else torch.float32
    compiled = torch.compile(eager_loss, mode="max-autotune" if on_gpu else None, dynamic=False)
    table = {
        "eager fp32": (torch.float32, by("reference")),
        "eager bf16": (torch.bfloat16, eager_loss),
        "compile": (fast, compiled),
        "chunked": (fast, by("chunked")),
    }
    return table | ({"triton": (fast, by("triton"))} if on_gpu else {})


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
        return lambda: loss(*tensors)
    if what == "backward":
        value = loss(*tensors)
        return lambda: torch.autograd.grad(value, tensors[0])
    return lambda: torch.autograd.grad(loss(*tensors), tensors[0])


def measure(shape: Shape, device: torch.device, seconds: float, rates: dict) -> list[dict]:
    """Every implementation on one shape."""
    table = implementations(device)
    inputs = {dtype: make_inputs(shape, dtype, device) for dtype, _ in table.values()}
    small = shape.batch * shape.length <= 2**22
    exact = [
        t.detach().to(torch.float64) if small and t.is_floating_point() else t for t in inputs[torch.float32]
    ]
    exact[0] = exact[0].detach().requires_grad_()
    truth = torch.autograd.grad(kdav_loss(*exact, **SETTINGS, impl="reference").loss, exact[0])[0].double()
    del exact
    extra, errors = {}, {}
    for name, (dtype, loss) in table.items():
        full = make_pass(loss, inputs[dtype], "full")
        errors[name] = float((full()[0].double() - truth).abs().max() / truth.abs().max())
        extra[name] = peak_extra_bytes(full, device)
    rows = []
    for what in PASSES:
        calls = {name: partial(make_pass, loss, inputs[dtype], what) for name, (dtype, loss) in table.items()}
        times = interleaved(calls, device, seconds)
        for name, (dtype, _) in table.items():
            flops, floor = roofline_seconds(shape, dtype, what, rates[dtype])
            median = times[name]["median_s"]
            row = {
                "shape": str(shape),
                **shape._asdict(),
                "pass": what,
                "implementation": name,
                **times[name],
            }
            row |= {"tflops": flops / median / 1e12, "times_roofline": median / floor}
            row |= {"speed_over_eager_fp32": times["eager fp32"]["median_s"] / median}
            row |= {"extra_mib": extra[name] / 2**20, "gradient_error": errors[name]}
            rows.append(row | {"error_against": "float64" if small else "float32 reference"})
            print(
                f"{shape!s:38}{what:9}{name:11}{median * 1e3:9.2f} ms "
                f"[{times[name]['p20_s'] * 1e3:.2f}, {times[name]['p80_s'] * 1e3:.2f}] "
                f"{row['tflops']:8.3f} TFLOP/s {row['times_roofline']:6.2f}x roofline "
                f"{row['speed_over_eager_fp32']:5.2f}x eager {row['extra_mib']:8.1f} MiB error {errors[name]:.1e}",
                flush=True,
            )
    return rows


def plot(rows: list[dict], environment: dict, path: Path) -> None:
    """Time of forward and backward together, and peak extra memory, by shape and implementation."""
    full = [row for row in rows if row["pass"] == "full"]
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


def run(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    device = check_device(options.device)
    path, picture = result_files(options, "loss_kernel")
    environment = describe(device)
    rates = {dtype: ceilings(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    environment["ceilings"] = {str(dtype): rate for dtype, rate in rates.items()}
    print(json.dumps(environment, indent=1))
    rows = []
    listed = shapes(device)
    for index, shape in enumerate(listed):
        print(f"[{index + 1}/{len(listed)}] {shape}", flush=True)
        rows += measure(shape, device, options.seconds, rates)
        torch._dynamo.reset()
    noise = widest_spread(rows)
    write_whole(path, json.dumps({"environment": environment, "rows": rows, "noise": noise}, indent=1) + "\n")
    plot(rows, environment, picture)
    warn_if_noisy(noise)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--seconds", type=positive(float), default=1.0, help="for one pass of one shape, all implementations")
    add("--json", type=Path, help="result (benchmarks/results/loss_kernel_DEVICE.json)")
    add("--plot", type=Path, help="picture (beside the result)")
    options = parser.parse_args()
    try:
        run(options)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
