"""How good the student is: labels only, KD, SimKD and KDAV from one teacher, and what KDAV's settings do.

    python benchmarks/accuracy.py --root FOLDER [--preset cpu|full] [--teacher RUN] [--work FOLDER]

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg, such as CIFAR-10's. Without --teacher, one is trained first, by the
package, on all of them (`launch/cifar10_teacher.yaml`). Images are mirrored at random and not augmented further, so the
teacher answers to each image and its mirror image once, for all students. Students are trained side by side on a CPU,
one core each, and one after another on a GPU. What is finished is kept in --work: the same command goes on from there.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import accuracy_data
import matplotlib.pyplot as plt
import torch
from accuracy_methods import MAIN, PRESETS, VARIANTS, Preset, Task, tasks
from accuracy_run import run, start_worker
from environment import describe
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from kdav_fast.config import Config, load_config
from kdav_fast.errors import InputError

RECIPES = Path(__file__).parent.parent / "launch"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "nvidia-dali-cuda130", "deepspeed", "numpy")


def train_teacher(options: argparse.Namespace, device: str) -> Path:
    """The run folder of the teacher: trained, or continued, by the package on all training images."""
    from kdav_fast.train.loop import run_training

    folder = options.work / "teacher"
    settings = [
        f"run_dir={folder}",
        f"device={device}",
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
    return load_config(RECIPES / "cifar10.yaml", [*settings, "data.resident=true", *options.override])


def train_all(todo: list[Task], file: Path, config: Config, options: argparse.Namespace) -> list[dict]:
    """Results of all students that the time allows, those of an earlier attempt included."""
    preset, log = options.settings, options.work / "students.jsonl"
    key = json.dumps(
        [file.name, asdict(replace(preset, minutes=0, seeds=0, variant_seeds=0)), options.device]
    )
    done = {}
    if log.exists():
        for line in map(json.loads, log.read_text().splitlines()):
            if line["key"] == key:
                done[line["method"], json.dumps(line["distiller"]), line["seed"]] = line
    results, waiting = [], []
    for task in todo:
        known = done.get((task.method, json.dumps(task.distiller), task.seed))
        results.append(known) if known else waiting.append(task)
    workers = options.workers or (1 if options.device == "cuda" else len(os.sched_getaffinity(0)))
    began, longest = time.monotonic(), 0.0
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        start_worker,
        (file, config.model, preset, options.device, options.threads),
    )
    bar = tqdm(total=len(todo), initial=len(results), desc="students")
    running: dict = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                if (time.monotonic() - began + longest) / 60 > preset.minutes and longest:
                    bar.write(f"the {preset.minutes:g} minutes are over: {len(waiting)} students not trained")
                    waiting.clear()
                    break
                task = waiting.pop(0)
                running[pool.submit(run, task)] = task, time.monotonic()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, since = running.pop(future)
                longest = max(longest, time.monotonic() - since)
                result = {"key": key, **task.identity(), **future.result()}
                with log.open("a") as lines:
                    lines.write(json.dumps(result) + "\n")
                results.append(result)
                bar.update()
                bar.write(f"{task.method}, seed {task.seed}: {result['top1']:.2f} %")
    finally:
        bar.close()
        # Students that are half trained are not waited for; finished ones are in the log.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
    return results


def summarize(results: list[dict]) -> list[dict]:
    """A row a method: mean and standard deviation of top-1 over seeds, mean minutes, curves."""
    by_method = defaultdict(list)
    for result in sorted(results, key=lambda result: result["seed"]):
        by_method[result["method"]].append(result)
    rows = []
    for method in [name for name in (*MAIN, *VARIANTS) if name in by_method]:
        runs = by_method[method]
        values = [one["top1"] for one in runs]
        rows.append(
            {
                "method": method,
                "settings": runs[0]["distiller"],
                "seeds": [one["seed"] for one in runs],
                "top1": values,
                "mean_top1": statistics.mean(values),
                "std_top1": statistics.stdev(values) if len(values) > 1 else None,
                "minutes": statistics.mean(one["minutes"] for one in runs),
                "curves": [one["curve"] for one in runs],
            }
        )
    return rows


def targets(rows: list[dict]) -> list[dict]:
    """DESIGN section 6: KDAV against KD and SimKD; only for methods that were trained."""
    mean = {row["method"]: row["mean_top1"] for row in rows}
    least = {"labels only": 0.0, "KD": 2.0, "SimKD": 0.0}
    found = []
    for method in ("KDAV", "KDAV, kappa 20"):
        for rival, points in least.items():
            measured = mean[method] - mean[rival] if {method, rival} <= mean.keys() else None
            found.append(
                {
                    "name": f"accuracy: {method} over {rival} (points of top-1)",
                    "target": points,
                    "measured": measured,
                    "met": None if measured is None else measured >= points,
                }
            )
    return found


def print_table(rows: list[dict], teacher_top1: float) -> None:
    """One line a method."""
    table = Table(title=f"top-1 % on images never trained on; the teacher has {teacher_top1:.2f}")
    for column in ("method", "mean", "deviation", "seeds", "minutes"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        deviation = "" if row["std_top1"] is None else f"{row['std_top1']:.2f}"
        values = f"{row['mean_top1']:.2f}", deviation, str(len(row["seeds"])), f"{row['minutes']:.1f}"
        table.add_row(row["method"], *values)
    Console().print(table)


def plot(rows: list[dict], environment: dict, path: Path) -> None:
    """Accuracy of every method with the deviation over seeds, and the four methods' accuracy against minutes."""
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder of train/CLASS/ and test/CLASS/")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--preset", choices=tuple(PRESETS), help="default: cpu on a CPU, full on a GPU")
    add("--teacher", type=Path, help="a finished run, or a file of weights, of the recipe's teacher")
    add(
        "--work", type=Path, default=Path("runs/accuracy"), help="what is finished is kept here (%(default)s)"
    )
    add("--methods", nargs="+", choices=(*MAIN, *VARIANTS), metavar="NAME", help="only these (default: all)")
    for name, kind in {"epochs": int, "seeds": int, "variant-seeds": int, "minutes": float}.items():
        add(f"--{name}", type=kind, help="instead of the preset's")
    add("--train-subset", type=int, help="instead of the preset's")
    add("--eager", action="store_true", help="without torch.compile")
    add("--workers", type=int, help="students trained side by side (default: one a core; 1 on a GPU)")
    add("--threads", type=int, default=1, help="of each student on a CPU (%(default)s)")
    add("--override", nargs="+", default=[], metavar="key=value", help="of launch/cifar10.yaml")
    add(
        "--teacher-override",
        nargs="+",
        default=[],
        metavar="key=value",
        help="of launch/cifar10_teacher.yaml",
    )
    add("--json", type=Path)
    add("--plot", type=Path)
    options = parser.parse_args()
    for name in ("epochs", "seeds", "variant_seeds", "train_subset", "workers", "threads", "minutes"):
        if (given := getattr(options, name)) is not None and given <= 0 and name != "variant_seeds":
            parser.error(f"--{name.replace('_', '-')} is {given}; give a number above 0")
    preset = PRESETS[options.preset or ("full" if options.device == "cuda" else "cpu")]
    given = {
        name: getattr(options, name)
        for name in ("epochs", "seeds", "variant_seeds", "minutes", "train_subset")
    }
    given = {name: value for name, value in given.items() if value is not None}
    options.settings = replace(preset, compiled=preset.compiled and not options.eager, **given)
    options.exit = parser.exit
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        teacher = options.teacher or train_teacher(options, options.device)
        config = student_config(options, options.settings, teacher)
        file = accuracy_data.prepare(config, device, options.work)
    except InputError as error:
        options.exit(2, f"accuracy.py: error: {error}\n")
    teacher_top1 = accuracy_data.load(file, torch.device("cpu")).teacher_top1
    print(f"the teacher has {teacher_top1:.2f} %", flush=True)
    results = train_all(tasks(options.settings, options.methods), file, config, options)
    rows = summarize(results)
    environment = describe(device, PACKAGES)
    if device.type == "cpu":
        environment["threads"] = options.threads  # of each student
    record = {
        "environment": environment,
        "preset": asdict(options.settings),
        "networks": {"student": config.model.model_dump(mode="json"), "teacher": config.teacher.name},
        "teacher_top1": teacher_top1,
        "rows": rows,
        "targets": targets(rows),
    }
    path = options.json or RESULTS / f"accuracy_{device.type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, environment, options.plot or path.with_suffix(".png"))
    print_table(rows, teacher_top1)


if __name__ == "__main__":
    main()
