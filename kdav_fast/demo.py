"""The demonstration: a teacher, three students, an exported file, a table, in a few minutes on a CPU."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdav_fast.config import Config, parse_config
from kdav_fast.inference.evaluate import Accuracy, evaluate_file
from kdav_fast.runtime.files import write_whole
from kdav_fast.runtime.json_text import json_text
from kdav_fast.runtime.run_lock import RunLock
from kdav_fast.runtime.stopping import STOPPED
from kdav_fast.student.export import export_safetensors
from kdav_fast.tracking.report import write_report
from kdav_fast.train.loop import run_training

_COMMON: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 16, "crop": "none", "flip": False},
    "schedule": {"name": "one_cycle"},
    "train": {"batch_size": 32, "log_every": 29, "save_every": 5},
}
_SHIFTED = {**_COMMON["data"], "crop": "padded", "crop_padding": 1}
_TEACHER = {"name": "cifar:resnet14"}
_STUDENT = {"name": "cifar:resnet8", "width": 0.25}
_TEACHER_EPOCHS, _STUDENT_EPOCHS = 15, 5
_METHODS = {
    "student": {"name": "none"},
    "kd": {"name": "kd"},
    "kdav": {"name": "kdav", "memory_length": 512},
}


def demo_configs(folder: Path) -> dict[str, Config]:
    """The four runs by the key of their result, teacher first."""

    def config(name: str, model: dict[str, Any], epochs: int, **sections: Any) -> Config:
        train = {**_COMMON["train"], "epochs": epochs}
        return parse_config(
            {**_COMMON, "run_dir": str(folder / name), "model": model, "train": train, **sections}
        )

    teacher = {**_TEACHER, "checkpoint": str(folder / "teacher")}
    runs = {"teacher": config("teacher", _TEACHER, _TEACHER_EPOCHS, data=_SHIFTED)}
    for name, distiller in _METHODS.items():
        runs[name] = config(name, _STUDENT, _STUDENT_EPOCHS, teacher=teacher, distiller=distiller)
    return runs


def run_demo(folder: Path) -> int:
    """Run, or continue, the demonstration in `folder`; returns the command's exit code."""
    with RunLock(folder):
        return _run_demo(folder)


def _run_demo(folder: Path) -> int:
    results: dict[str, Accuracy] = {}
    configs = demo_configs(folder)
    for name, config in configs.items():
        print(f"== {name}", flush=True)
        accuracy = run_training(config)
        if accuracy is None:
            return STOPPED
        results[name] = accuracy
    exported = folder / "kdav" / "export" / "student.safetensors"
    export_safetensors(folder / "kdav", exported)
    exported_accuracy = evaluate_file(exported)

    summary = {name: round(accuracy.top1, 2) for name, accuracy in results.items()}
    summary["exported"] = round(exported_accuracy.top1, 2)
    write_whole(folder / "summary.json", json_text(summary, indent=2) + "\n")
    page = write_report(
        {name: config.run_dir for name, config in configs.items()},
        folder / "report",
        title="Handwritten digits: one teacher, three students",
        summary=summary,
    )
    _print_table(summary, exported)
    print(f"report: {page}")
    return 0


def _print_table(summary: dict[str, float], exported: Path) -> None:
    rows = {
        "teacher": "teacher, resnet14",
        "student": "student, resnet8 of a quarter of the width: labels only",
        "kd": "the same student: knowledge distillation (KD)",
        "kdav": "the same student: with the auxiliary variable (KDAV)",
        "exported": f"{exported}, stock architecture",
    }
    table = Table(title="digits, top-1 on images never trained on")
    table.add_column("model")
    table.add_column("top-1 %", justify="right")
    for key, label in rows.items():
        table.add_row(label, f"{summary[key]:.2f}")
    Console().print(table)
