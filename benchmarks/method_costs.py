"""What every method costs: time and memory of its step beside KD's, in one run.

    python benchmarks/method_costs.py [--device cpu|cuda] [--methods NAME ...] [--json FILE] [--plot FILE]

A step is the package's own: the teacher's answers, the student, the loss, the optimizer, and what the method remembers.
The teacher is asked in every step, as in a run: a method with several views asks it, and the student, about each, and a
method without a teacher saves its pass; both are in its figure. Nothing is loaded: the images lie on the device.
Networks are not compiled. Settings are the published ones for the preset's data.

Each method takes turns with KD, a fraction of a second each, first one before and then the other; a figure is the
median of its pairs, with the 20th and 80th percentiles. KD beside KD shows what is noise. Time is that between events
on a GPU. On a CPU it is processor time of one thread, which does not count what else the machine does. Memory is what
the tensors of the method's run hold between steps, the teacher and the batch among them, plus the most that a step
holds beyond that, as torch's allocator counts on a GPU and its profiler on a CPU. What is learned and remembered
follows from shapes: for this data set, and in bf16 for ImageNet from ResNet-34 to ResNet-18.

Every pair is on the disk when it is measured: the same command goes on from there. A method that fails, for want of
memory say, is told in the table, and the others go on.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import Parser, check_device, default_device, draw, positive, result_files
from environment import REPOSITORY, describe
from method_cost_results import BASE, plot, print_table, summarise
from method_needs import needs
from method_steps import MethodSteps, make_config, make_data, write_teacher
from record import Record, failure, leave_if_broken

from kdav_fast.config import load_config
from kdav_fast.config.method import method_names, method_section
from kdav_fast.errors import InputError
from kdav_fast.runtime.precision import autocast_dtype
from kdav_fast.runtime.processes import Cluster, start_cluster

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "triton", "numpy")
RECIPE = REPOSITORY / "launch" / "imagenet_resnet34_resnet18.yaml"
CIFAR = {"kdav": {"memory_length": 16384}}
"""What the recipe for CIFAR-100 sets that costs something; all other defaults are the published ones."""
ON_IMAGENET = {
    "teacher": "torchvision:resnet34",
    "student": "torchvision:resnet18",
    "image_size": 224,
    "classes": 1000,
    "images": 1_281_167,
}
PRESETS = {
    "cuda": {**ON_IMAGENET, "batch_size": 256, "precision": "bf16", "rounds": 6, "turn_seconds": 0.4},
    "cpu": {
        "teacher": "cifar:resnet32x4",
        "student": "cifar:resnet8x4",
        "image_size": 32,
        "classes": 100,
        "images": 50_000,
        "batch_size": 16,
        "precision": "fp32",
        "rounds": 5,
        "turn_seconds": 0.4,
    },
}


class Bench:
    """The methods at work, KD among them.

    Args:
        folder: for the teacher's file.
        settings: device, networks, sizes, and by name the keys of `methods` that are not at their defaults.
        cluster: this process.
        turn_seconds: of one turn, or a single step where that takes longer.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], cluster: Cluster, turn_seconds: float) -> None:
        self._folder, self._settings, self._cluster = folder, settings, cluster
        self._turn_seconds = turn_seconds
        self._data = make_data(settings["images"], settings["classes"])
        self._at_work: dict[str, MethodSteps] = {}
        self._steps: dict[str, int] = {}
        write_teacher(folder, settings)
        self._build(BASE)
        self.drop(BASE)  # what libraries allocate once for the process must not count as KD's
        self._build(BASE)

    def _build(self, name: str) -> None:
        print(f"starting {name}", flush=True)
        config = make_config(self._folder, self._settings, self._method(name))
        one = MethodSteps(config, self._data, self._cluster)
        self._steps[name] = max(1, round(self._turn_seconds / one.take_turn(1)))
        self._at_work[name] = one

    def _method(self, name: str) -> dict[str, Any]:
        return {"name": name, **self._settings["methods"].get(name, {})}

    def start(self, name: str) -> None:
        """Have a method at work, if it is not."""
        if name not in self._at_work:
            self._build(name)

    def facts(self, name: str) -> dict[str, Any]:
        """What is known of a method at work before its first turn."""
        one, dtype = self._at_work[name], autocast_dtype(self._settings["precision"], self._cluster.device)
        return {
            "method": name,
            "held_bytes": one.held_bytes,
            "step_bytes": one.step_bytes,
            **needs(method_section(self._method(name)), self._settings, dtype or torch.float32),
            "on_imagenet": _on_imagenet(name),
        }

    def take_turns(self, name: str, number: int) -> dict[str, Any]:
        """One of the method and one of KD; the round's number says which comes first."""
        turns = [("step_s", name), ("kd_step_s", BASE)]
        seconds = {
            key: self._at_work[who].take_turn(self._steps[who]) for key, who in turns[:: (-1) ** number]
        }
        return {"method": name, "round": number, "steps": self._steps[name], **seconds}

    def drop(self, name: str) -> None:
        """Of a method that failed nothing stays."""
        self._at_work.pop(name, None)
        gc.collect()
        if self._cluster.device.type == "cuda":
            torch.cuda.empty_cache()


def published(name: str) -> dict[str, Any]:
    """The keys that the recipe for ImageNet sets for a method."""
    overrides = [f"distiller.name={name}", "data.crop=padded"]  # sskd refuses the recipe's small crops
    return load_config(RECIPE, overrides).distiller.model_dump(exclude_unset=True)


def _on_imagenet(name: str) -> dict[str, Any]:
    try:
        return needs(method_section({"name": name, **published(name)}), ON_IMAGENET, torch.bfloat16)
    except InputError as error:
        return {"error": str(error)}


def measure(names: list[str], rounds: int, build: Callable[[], Bench], record: Record) -> None:
    """A pair of each as soon as it is started, then of all in turn; only what the record does not hold yet.

    Args:
        names: in the order in which they are started.
        build: called when there is something to measure.
    """
    bench = None
    for number in range(1, rounds + 1):
        for name in names:
            known = record.find(method=name)
            if any("error" in one for one in known) or sum("step_s" in one for one in known) >= number:
                continue
            bench = bench or build()
            error = _attempt(name, number, bench, record, new=not known)
            if error is None:
                continue
            print(f"{name} failed: {failure(error)}", flush=True)
            record.add({"method": name, "error": failure(error)})
            leave_if_broken(error)
            del error  # and with it what the method has left on the stack
            bench.drop(name)


def _attempt(name: str, number: int, bench: Bench, record: Record, new: bool) -> Exception | None:
    """Whatever a library or the device raises costs this method only."""
    try:
        with record.attempt(name):
            bench.start(name)
            rows = [bench.facts(name)] * new + [bench.take_turns(name, number)]
    except Exception as error:
        return error
    record.add(*rows)
    pair = rows[-1]
    print(f"round {number}: {name} {pair['step_s'] / pair['kd_step_s']:.3f} x KD", flush=True)
    return None


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number, seconds = positive(int), positive(float)
    add = parser.add_argument
    add(
        "--device",
        choices=tuple(PRESETS),
        default=default_device(),
        help="and the preset of sizes (%(default)s)",
    )
    add("--methods", nargs="+", metavar="NAME", help="(all)")
    add("--teacher", help="network; its weights are random")
    add("--student", help="network")
    add("--image-size", type=number, help="side of the square in pixels")
    add("--batch-size", type=number, help="images a step, in each of a method's views")
    add("--classes", type=number, help="over which the images are spread")
    add("--images", type=number, help="of the data set, which some methods remember")
    add("--precision", choices=("fp32", "bf16"), help="of the networks")
    add("--rounds", type=number, help="pairs of each method")
    add("--turn-seconds", type=seconds, help="of one turn, which is a step at least")
    add("--json", type=Path, help="result (benchmarks/results/method_costs_DEVICE.json)")
    add("--plot", type=Path, help="picture (beside the result)")
    presets = (f"{device}: {', '.join(f'{k} {v}' for k, v in p.items())}" for device, p in PRESETS.items())
    parser.epilog = "presets:\n" + "\n".join(presets)
    return parser


def check_options(options: argparse.Namespace) -> list[str]:
    """Fill in the preset; returns the methods. Raises InputError for what cannot be measured."""
    check_device(options.device)
    for key, value in PRESETS[options.device].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.batch_size > options.images:
        raise InputError(f"--batch-size is {options.batch_size}, more than --images {options.images}")
    known = method_names()
    for name in options.methods or ():
        if name not in known:
            raise InputError(f"--methods has '{name}'; allowed: {', '.join(map(repr, known))}")
    options.json, options.plot = result_files(options, "method_costs")
    chosen = options.methods or known
    return [BASE, *(name for name in known if name in chosen and name != BASE)]


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure and write; raises InputError for what the user can mend."""
    names = check_options(options)
    cluster = start_cluster(options.device)
    if options.device == "cpu":
        torch.set_num_threads(1)
    settings = {key: getattr(options, key) for key in ("device", *PRESETS[options.device])}
    turn_seconds, rounds = settings.pop("turn_seconds"), settings.pop("rounds")
    settings["methods"] = CIFAR
    if options.device == "cuda":
        settings["methods"] = {name: published(name) for name in method_names()}
    environment = describe(cluster.device, PACKAGES)
    print(json.dumps({"environment": environment, "settings": settings}, indent=1), flush=True)
    record = Record(options.json, environment, settings, summarise, name="measured")
    measure(names, rounds, lambda: Bench(folder, settings, cluster, turn_seconds), record)
    result = record.write()
    draw(partial(plot, result, options.plot))
    print_table(result)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="method_costs_") as folder:
        make_parser().run(partial(run, folder=Path(folder)), goes_on=True)


if __name__ == "__main__":
    main()
