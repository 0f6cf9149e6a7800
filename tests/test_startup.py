"""What a command loads: who asks for help, has a mistake in a config or wants a report does not wait for torch."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from kdav_fast.cli import main

HEAVY = ("torch", "torchvision", "timm", "deepspeed", "nvidia.dali", "tensorboard", "sklearn")
PROGRAM = f"""
import sys
from kdav_fast.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
sys.exit(code)
"""


def loaded(arguments, code, directory):
    """The heavy packages that a command has imported; `code` is the exit code it must have."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=directory,
    )
    assert ran.returncode == code, ran.stderr
    return ran.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["distill", "--help"], 0),
        (["distill", "missing.yaml"], 2),
        (["train", "bad.yaml", "lr=3"], 2),
        (["train", "bad.yaml"], 2),
        (["distill", "bad.yaml", "distiller.name=kd", "distiller.alhpa=1"], 2),
        (["distill", "good.yaml", "distiller.name=none", "train.epochs=0"], 2),
        (["distill", "good.yaml", "distiller.name=magic"], 2),
        (["distill", "good.yaml", "distiller=kd"], 2),
        (["train", "good.yaml", "distiller.name=kd"], 2),
        (["report", "run"], 0),
        (["report", "missing"], 2),
        (["data", "check", "images"], 0),
        (["data", "check", "missing"], 2),
        (["frobnicate"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_needs_no_torch_does_not_load_it(tmp_path, arguments, code):
    (tmp_path / "bad.yaml").write_text("train: {epochs: many}\n")
    (tmp_path / "good.yaml").write_text("distiller: {name: none}\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 1.0, "train/loss": 1.0}) + "\n")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / f"{name[-1]}{name[:-2]}.png")
    assert loaded(arguments, code, tmp_path) == []


def test_a_run_says_what_it_is_busy_with(tmp_path, capsys):
    settings = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"name": "digits", "image_size": 8, "crop": "none", "flip": False, "loader": "torchvision"},
        "model": {"name": "cifar:no-such"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    assert main(["train", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "loading PyTorch",
        "reading digits images",
        "897 training and 900 evaluation images of 10 classes; building cifar:no-such",
    ]
    assert "unknown model 'cifar:no-such'" in printed.err


def test_importing_the_loop_loads_no_model_library():
    code = f"import kdav_fast.train.loop, sys; print(*(n for n in {HEAVY[1:]} if n in sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert ran.stdout.split() == []
