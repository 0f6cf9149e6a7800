"""How good the student is: labels only, KD, SimKD and KDAV from one teacher, and what KDAV's settings do.

    python benchmarks/accuracy.py --root FOLDER [--preset cpu|full] [--teacher RUN] [--work FOLDER]

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg, such as CIFAR-10's. Without --teacher, one is trained first, by the
package, on all of them (`launch/cifar10_teacher.yaml`). Images are mirrored at random and not augmented further, so the
teacher answers to each image and its mirror image once, for all students. Students are trained side by side on a CPU,
one core each, and one after another on a GPU. What is finished is kept in --work and shown in the result at once: the
same command goes on from there.

Where --train-subset leaves training images out, students are also evaluated on those (10,000 at most): settings are
chosen by them, and the evaluation images stay unseen.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import accuracy_data
import torch
from accuracy_methods import MAIN, PRESETS, VARIANTS, Preset, Task, tasks
from accuracy_run import run, start_worker
from command_line import Parser, check_device, default_device, draw, positive, result_files
from environment import describe, version
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from kdav_fast.config import Config, load_config
from kdav_fast.runtime.files import write_whole

RECIPES = Path(__file__).parent.parent / "launch"
DALI = "nvidia-dali-cuda130"
PACKAGES = ("torch", "timm", DALI, "deepspeed", "numpy")


def train_teacher(options: argparse.Namespace) -> Path:
    """The run folder of the teacher: trained, or continued, by the package on all training images."""
    from kdav_fast.train.loop import run_training

    folder = options.work / "teacher"
    settings = [
        f"run_dir={folder}",
        f"device={options.device}",
        f"data.root={options.root}",
        "data.train_subset=null",
    ]
    settings += [
        "data.resident=true",
        "train.precision=bf16",
        "model.compile=true",
        *options.teacher_override,
    ]
    if run_training(load_config(RECIPES / "cifar10_teacher.yaml", settings)) is None:
        raise KeyboardInterrupt
    return folder


def student_config(options: argparse.Namespace, preset: Preset, teacher: Path) -> Config:
    """Images, networks and normalisation of the students; how they are trained is the preset's."""
    subset = "null" if preset.train_subset is None else preset.train_subset
    settings = [f"data.root={options.root}", f"teacher.checkpoint={teacher}", f"data.train_subset={subset}"]
    if version(DALI) is None:
        settings.append("data.loader=torchvision")
    return load_config(RECIPES / "cifar10.yaml", [*settings, "data.resident=true", *options.override])


class Log:
    """The finished students of a folder, one a line: what an earlier attempt has trained is not trained again.

    Args:
        file: appended to.
        circumstances: all that decides a student besides its task.
    """

    def __init__(self, file: Path, circumstances: list) -> None:
        self._file, self._key = file, json.dumps(circumstances)
        self._known: dict[str, dict] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            with suppress(ValueError):  # half a line, where the program was killed in it
                result = json.loads(line)
                if result["key"] == self._key:
                    self._known[json.dumps(result["task"])] = result

    def find(self, task: Task) -> dict | None:
        return self._known.get(json.dumps(asdict(task)))

    def add(self, task: Task, outcome: dict) -> dict:
        result = {"key": self._key, "task": asdict(task), **outcome}
        whole = not self._file.exists() or self._file.read_bytes()[-1:] in (b"", b"\n")
        with self._file.open("a") as lines:
            lines.write(("" if whole else "\n") + json.dumps(result) + "\n")
        return result


def train_all(
    listed: list[Task],
    file: Path,
    config: Config,
    options: argparse.Namespace,
    show: Callable[[list[dict]], object],
    everything: bool = False,
) -> list[dict]:
    """Results of all students that the time allows, those of an earlier attempt included; `show` hears of each.

    `everything` is for methods that want maps or turned images: see `accuracy_data.prepare`.
    """
    preset, device = options.settings, options.device
    # Learning rate and epochs are a task's.
    same = asdict(replace(preset, minutes=0, seeds=0, variant_seeds=0, lr=0, epochs=0))
    circumstances = [file.name, config.model.model_dump(mode="json"), same, device, torch.__version__]
    log = Log(options.work / "students.jsonl", circumstances)
    found = {task: log.find(task) for task in listed}
    waiting = [task for task in listed if found[task] is None]
    results = [result for result in found.values() if result is not None]
    workers = options.workers or (1 if device == "cuda" else len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        start_worker,
        (file, config.model, preset, device, options.threads, everything),
    )
    began, longest = time.monotonic(), 0.0
    running: dict[Future, tuple[Task, float]] = {}
    bar = tqdm(total=len(listed), initial=len(results), desc="students")
    try:
        while waiting or running:
            if longest and (time.monotonic() - began + longest) / 60 > preset.minutes and waiting:
                bar.write(f"the {preset.minutes:g} minutes are over: {len(waiting)} students not trained")
                waiting.clear()
            while waiting and len(running) < workers:
                task = waiting.pop(0)
                running[pool.submit(run, task)] = task, time.monotonic()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, since = running.pop(future)
                longest = max(longest, time.monotonic() - since)
                results.append(log.add(task, future.result()))
                show(results)
                bar.update()
                held_out = results[-1]["held_out_top1"]
                beside = "" if held_out is None else f" (held-out images: {held_out:.2f} %)"
                bar.write(f"{task.method}, seed {task.seed}: {results[-1]['top1']:.2f} %{beside}")
    except BaseException:
        for process in multiprocessing.active_children():  # half a student is worth nothing: not waited for
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    return results


def summarize(results: list[dict]) -> list[dict]:
    """A row a method: mean and standard deviation of top-1 over seeds, mean on held-out images, minutes, curves."""
    by_method = defaultdict(list)
    for result in sorted(results, key=lambda result: result["task"]["seed"]):
        by_method[result["task"]["method"]].append(result)
    rows = []
    for method in [name for name in (*MAIN, *VARIANTS) if name in by_method]:
        runs = by_method[method]
        values = [one["top1"] for one in runs]
        held_out = [one["held_out_top1"] for one in runs]
        rows.append(
            {
                "method": method,
                "settings": {key: runs[0]["task"][key] for key in ("init", "lr")}
                | runs[0]["task"]["distiller"],
                "seeds": [one["task"]["seed"] for one in runs],
                "top1": values,
                "mean_top1": statistics.mean(values),
                "std_top1": statistics.stdev(values) if len(values) > 1 else None,
                "held_out_top1": None if None in held_out else statistics.mean(held_out),
                "minutes": statistics.mean(one["minutes"] for one in runs),
                "curves": [one["curve"] for one in runs],
            }
        )
    return rows


def targets(rows: list[dict]) -> list[dict]:
    """DESIGN section 6: KDAV against KD and SimKD; only for methods that were trained."""
    mean = {row["method"]: row["mean_top1"] for row in rows}
    deviation = {row["method"]: row["std_top1"] or 0.0 for row in rows}
    least = {"labels only": 0.0, "KD": 2.0, "SimKD": 0.0}
    found = []
    for method, rival in product(("KDAV", "KDAV, kappa 20"), least):
        one = {
            "name": f"accuracy: {method} over {rival} (points of top-1)",
            "target": least[rival],
            "measured": None,
            "met": None,
        }
        if {method, rival} <= mean.keys():
            one["measured"] = mean[method] - mean[rival]
            one["met"] = one["measured"] >= least[rival]
            noise = math.hypot(deviation[method], deviation[rival])
            if not one["met"] and least[rival] - one["measured"] < noise:
                one["reason"] = f"by less than the {noise:.1f} that seeds differ by"
        found.append(one)
    return found


def print_table(rows: list[dict], teacher_top1: float) -> None:
    """One line a method."""
    table = Table(
        title=f"top-1 % on images that no student was trained on; the teacher has {teacher_top1:.2f}"
    )
    for column in ("method", "mean", "deviation", "held out", "seeds", "minutes"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        deviation = "" if row["std_top1"] is None else f"{row['std_top1']:.2f}"
        held_out = "" if row["held_out_top1"] is None else f"{row['held_out_top1']:.2f}"
        values = (
            f"{row['mean_top1']:.2f}",
            deviation,
            held_out,
            str(len(row["seeds"])),
            f"{row['minutes']:.1f}",
        )
        table.add_row(row["method"], *values)
    Console().print(table)


def plot(rows: list[dict], environment: dict, path: Path) -> None:
    """Accuracy of every method with the deviation over seeds, and that of the design's set-up against minutes."""
    import matplotlib.pyplot as plt

    figure, (bars, lines) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.35 * max(8, len(rows))))
    places = range(len(rows))
    bars.barh(
        places,
        [row["mean_top1"] for row in rows],
        xerr=[row["std_top1"] or 0 for row in rows],
        color="#0072B2",
    )
    for place, row in zip(places, rows, strict=True):
        bars.plot(row["top1"], [place] * len(row["top1"]), "k.", markersize=4)
    bars.set_yticks(places, [row["method"] for row in rows])
    bars.invert_yaxis()
    lowest = min(min(row["top1"]) for row in rows)
    bars.set_xlim(left=max(0, lowest - 3))
    bars.set_xlabel("top-1 (%): mean, deviation, single seeds")
    for row in rows:
        if row["method"] in MAIN:
            points = [
                list(map(statistics.mean, zip(*at, strict=True))) for at in zip(*row["curves"], strict=True)
            ]
            lines.plot([p[1] for p in points], [p[2] for p in points], "o-", label=row["method"])
    lines.set_xlabel("minutes of training" + ("" if "CPU" not in environment["device"] else " on one core"))
    lines.set_ylabel("top-1 (%)")
    lines.grid(alpha=0.3)
    lines.legend()
    figure.suptitle(f"{environment['device']}, torch {environment['versions']['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count, number = parser.add_argument, positive(int), positive(float)
    add("--root", type=Path, required=True, help="folder of train/CLASS/ and test/CLASS/")
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--preset", choices=tuple(PRESETS), help="default: cpu on a CPU, full on a GPU")
    add("--teacher", type=Path, help="a finished run, or a file of weights, of the recipe's teacher")
    add(
        "--work", type=Path, default=Path("runs/accuracy"), help="what is finished is kept here (%(default)s)"
    )
    add("--methods", nargs="+", choices=(*MAIN, *VARIANTS), metavar="NAME", help="only these (default: all)")
    for name in ("epochs", "seeds", "variant-seeds", "train-subset"):
        add(f"--{name}", type=count, help="instead of the preset's")
    for name in ("lr", "minutes"):
        add(f"--{name}", type=number, help="instead of the preset's")
    add("--eager", action="store_true", help="without torch.compile")
    add("--workers", type=count, help="students trained side by side (default: one a core; 1 on a GPU)")
    add("--threads", type=count, default=1, help="of each student on a CPU (%(default)s)")
    add("--override", nargs="+", default=[], metavar="key=value", help="of launch/cifar10.yaml")
    add(
        "--teacher-override",
        nargs="+",
        default=[],
        metavar="key=value",
        help="of launch/cifar10_teacher.yaml",
    )
    add("--json", type=Path, help="result (benchmarks/results/accuracy_DEVICE.json)")
    add("--plot", type=Path, help="picture (beside the result)")
    return parser


def chosen_preset(options: argparse.Namespace) -> Preset:
    """The preset with what the command line changes of it."""
    preset = PRESETS[options.preset or ("full" if options.device == "cuda" else "cpu")]
    names = ("epochs", "seeds", "variant_seeds", "minutes", "train_subset", "lr")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(preset, compiled=preset.compiled and not options.eager, **given)


def compare(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    device = check_device(options.device)
    path, picture = result_files(options, "accuracy")
    options.settings = chosen_preset(options)
    options.work.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or train_teacher(options)
    config = student_config(options, options.settings, teacher)
    file = accuracy_data.prepare(config, device, options.work)
    teacher_top1 = accuracy_data.load(file, torch.device("cpu")).teacher_top1
    print(f"the teacher has {teacher_top1:.2f} %", flush=True)
    listed = tasks(options.settings, config.model.init, options.methods)
    environment = describe(device, PACKAGES)
    if device.type == "cpu":
        environment["threads"] = options.threads  # of each student

    def write(results: list[dict]) -> list[dict]:
        rows = summarize(results)
        record = {
            "environment": environment,
            "preset": asdict(options.settings),
            "networks": {"student": config.model.model_dump(mode="json"), "teacher": config.teacher.name},
            "teacher_top1": teacher_top1,
            "rows": rows,
            "targets": targets(rows),
        }
        write_whole(path, json.dumps(record, indent=1) + "\n")
        return rows

    rows = write(train_all(listed, file, config, options, write))
    if rows:
        draw(partial(plot, rows, environment, picture))
    print_table(rows, teacher_top1)


def main() -> None:
    make_parser().run(compare, goes_on=True)


if __name__ == "__main__":
    main()
