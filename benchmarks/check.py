"""Whether what runs on a device is right, before anything is timed there: the loss by every implementation, the step.

    python benchmarks/check.py [--device cpu|cuda] [--preset full|tiny] [--json FILE]

A row a case and implementation of the loss: errors of both terms and of the gradient against float64, beside what
plain torch in the same dtype has; whether a second call gives the same bits. Then, on a GPU, training steps under
`torch.cuda.set_sync_debug_mode("error")`, which ends a step that waits for the device. Exit code 1 if a row is wrong.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command_line import Parser, check_device, default_device, result_files
from environment import describe, version
from loss_kernel import SETTINGS, Shape, eager_terms, make_inputs
from record import Record, failure, leave_if_broken
from torch import Tensor

from kdav_fast import kdav_loss
from kdav_fast.errors import InputError

ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Beyond the error of torch in the same dtype."""
WARM_UP, STEPS = 4, 3


class Case(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    filled: int | None = None
    """Rows of the memory in use, as a tensor; None: all. With it, bfloat16 meets a float16 memory, as in training."""


SMALL = [(1, 3, 1, 2), (3, 20, 40, 600), (33, 300, 129, 7), (65, 37, 600, 11)]
A = (256, 512, 16384, 1000)
"""The shape of training, which the last cases are near: masked, and with no size a multiple of anything."""
NEAR = [(A, None), (A, 10_001), ((255, 509, 16_001, 999), None), ((250, 500, 8191, 1001), 4097)]
_EVERY_SMALL = [
    Case(Shape(*size, kind), dtype) for size in SMALL for kind in ("ids", "dense") for dtype in ALLOWED
]
_NEAR = [
    Case(Shape(*size, kind), torch.bfloat16, filled) for size, filled in NEAR for kind in ("ids", "dense")
]
_LARGE = [Case(Shape(1024, 2048, 65536, 1000, kind), torch.bfloat16, 60_001) for kind in ("ids", "dense")]
PRESETS = {
    "full": [*_NEAR, *_LARGE, *_EVERY_SMALL],
    "small": _EVERY_SMALL,
    "tiny": [Case(Shape(*SMALL[1], kind), torch.bfloat16, 31) for kind in ("ids", "dense")],
}


def answers(loss: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Both terms of every row, and the gradient of their sum."""
    leaf = tensors[0].detach().requires_grad_()
    terms = loss(leaf, *tensors[1:])
    (gradient,) = torch.autograd.grad(sum(terms).sum(), leaf)
    return [*(term.detach() for term in terms), gradient]


def terms_by(impl: str, filled: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """By `kdav_loss`, each with its gradient."""
    call = partial(kdav_loss, *tensors, filled, **SETTINGS, reduction="none", impl=impl)
    weights = ({"weight_prediction": 0.0}, {"weight_membership": 0.0})
    return tuple(call(**one).loss for one in weights)


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest of each: of the terms as a share of the largest true one or of 1, of the gradient of its largest."""
    least = (1.0, 1.0, 1e-6)
    return [
        float((f - t).abs().max() / t.abs().max().clamp(min=floor))
        for f, t, floor in zip(found, truth, least, strict=True)
    ]


def check_loss(case: Case, impl: str, device: torch.device) -> dict[str, Any]:
    """Errors of one implementation, and whether they are allowed."""
    tensors = make_inputs(case.shape, case.dtype, device)
    used = case.filled or case.shape.length
    kept = [*tensors[:3], tensors[3][:used], tensors[4][:used]]
    wide = [t.double() if t.is_floating_point() else t for t in kept]
    truth = answers(eager_terms, wide)
    torch_errors = errors(answers(eager_terms, kept), truth)
    filled = None if case.filled is None else torch.tensor(case.filled, device=device)
    if filled is not None and case.dtype == torch.bfloat16:
        tensors[3] = tensors[3].half()  # the same values
    loss = partial(terms_by, impl, filled)
    first, second = (answers(loss, tensors) for _ in range(2))
    own = errors(first, truth)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    limits = [(e if e < float("inf") else 0.0) + ALLOWED[case.dtype] for e in torch_errors]
    within = all(e <= limit for e, limit in zip(own, limits, strict=True))
    return {"errors": own, "torch_errors": torch_errors, "same_bits_again": same, "right": within and same}


def check_step(overrides: dict[str, str]) -> dict[str, Any]:
    """That steps of the ImageNet recipe, with small networks, never wait for the GPU."""
    from itertools import repeat

    from data_pipeline import DALI
    from step_images import link_tree, make_photographs, make_recipe, override_recipe

    from kdav_fast.data import Batch
    from kdav_fast.runtime.processes import start_cluster
    from kdav_fast.train.setup import set_up
    from kdav_fast.train.step import take_step

    sizes = {"teacher": "cifar:resnet14", "student": "cifar:resnet8", "image_size": 32, "batch_size": 64}
    sizes |= {"classes": 10, "memory_length": 1024, "posterior": "ids", "device": "cuda"}
    with tempfile.TemporaryDirectory(prefix="check_") as name:
        folder = Path(name)
        tree = link_tree(folder / "tree", make_photographs(folder / "files", 4), 64, sizes["classes"])
        plain = {} if version(DALI) else {"data.loader": "torchvision"}
        run = set_up(
            override_recipe(make_recipe(folder, tree, sizes), plain | overrides), start_cluster("cuda")
        )
        run.start_engine()
        run.trainee.train()
        images = torch.randn(64, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        labels = torch.arange(64, device="cuda") % sizes["classes"]
        batches = repeat(Batch(images, labels, torch.ones_like(labels, dtype=torch.bool), labels))
        for step in range(WARM_UP):
            take_step(run, batches, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(WARM_UP, WARM_UP + STEPS):
                take_step(run, batches, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"right": True}


RECIPES = {
    "bf16": {"train.precision": "bf16"},
    "bf16, dense posteriors": {"train.precision": "bf16", "distiller.posterior": "dense"},
    "bf16, average of the weights": {"train.precision": "bf16", "train.ema_decay": "0.99"},
    "KD, bf16": {"train.precision": "bf16", "distiller": '{"name": "kd"}'},
}


def listed(options: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every check by name."""
    on_gpu = device.type == "cuda"
    names = ("chunked", "triton") if on_gpu else ("chunked",)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"{case.shape} {str(case.dtype).removeprefix('torch.')}"
        f"{'' if case.filled is None else f' {case.filled} in use'}, {impl}": partial(
            check_loss, case, impl, device
        )
        for case in PRESETS[options.preset]
        for impl in names
    }
    if on_gpu and version("deepspeed") and version("pydantic"):
        found |= {
            f"no wait in a step, {name}": partial(check_step, recipe) for name, recipe in RECIPES.items()
        }
    return found


def run(options: argparse.Namespace) -> bool:
    """Whether all is right; raises InputError for what the user can mend."""
    device = check_device(options.device)
    path, _ = result_files(options, "check")
    code = ("kdav_fast", "kernels", "benchmarks/check.py")
    environment = describe(device, ("torch", "triton", "deepspeed"), code)
    record = Record(path, environment, {"preset": options.preset})
    for name, check in listed(options, device).items():
        if record.find(what=name):
            continue
        try:
            with record.attempt(name):
                row = {"what": name, **check()}
        except Exception as error:  # whatever a compiler, the device or the guard against waiting raises
            row = {"what": name, "right": False, "error": failure(error)}
            record.add(row)
            leave_if_broken(error)
        else:
            record.add(row)
        print(said_of(row), flush=True)
    record.write()
    wrong = [row for row in record.rows if not row["right"]]
    print(f"{len(record.rows) - len(wrong)} of {len(record.rows)} are right")
    for row in wrong:
        print(said_of(row))
    return not wrong


def said_of(row: dict[str, Any]) -> str:
    told = row.get("error", "")
    if "errors" in row:
        told = f"errors {', '.join(f'{e:.1e}' for e in row['errors'])}"
        told += f" (torch: {', '.join(f'{e:.1e}' for e in row['torch_errors'])})"
        told += "" if row["same_bits_again"] else ", other bits the second time"
    return f"{'right' if row['right'] else 'WRONG'}  {row['what']:62} {told}"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--preset", choices=tuple(PRESETS), help="cases (full on a GPU, small on a CPU)")
    parser.add_argument("--json", type=Path, help="result (benchmarks/results/check_DEVICE.json)")
    options = parser.parse_args()
    options.plot = None
    options.preset = options.preset or ("full" if options.device == "cuda" else "small")
    try:
        right = run(options)
    except InputError as error:
        parser.error(str(error))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
