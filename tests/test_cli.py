"""The command line as a user meets it: what it prints, what it exits with, and what bad input gets."""

import json
import math
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from kdav_fast.cli import main
from kdav_fast.inference import evaluate

SMALL = [
    "device=cpu",
    "data.image_size=8",
    "data.crop=none",
    "data.flip=false",
    "data.workers=1",
    "model.width=0.25",
    "train.epochs=1",
    "train.batch_size=8",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two classes, 8 training and 4 evaluation images each, JPEG and PNG."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    return root


@pytest.fixture
def config(tmp_path, images):
    """Writes a config file over that folder: `config(section={...})` gives its path."""

    def write(**sections):
        raw = {"run_dir": str(tmp_path / "run"), "data": {"name": "folder", "root": str(images)}, **sections}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        return str(path)

    return write


def fails(capsys, *arguments: str) -> str:
    """Run a command that must end with exit code 2 and one line; returns the line."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured
    assert lines[0].startswith("kdav: error: ")
    return lines[0]


def test_train_evaluate_export_report(config, images, tmp_path, capsys):
    path = config()
    assert main(["train", path, *SMALL]) == 0
    assert "top-1" in capsys.readouterr().out.splitlines()[-1]
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["batch_size"] == 8

    assert main(["evaluate", str(run), "--json"]) == 0
    from_run = json.loads(capsys.readouterr().out)
    assert from_run["images"] == 8
    assert main(["export", str(run)]) == 0
    exported = run / "export" / "student.safetensors"
    moved = tmp_path / "elsewhere"
    shutil.copytree(images / "val", moved / "val")  # evaluation needs no training images
    capsys.readouterr()
    assert main(["evaluate", str(exported), "--json", f"data.root={moved}"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(from_run)
    assert main(["evaluate", str(sorted((run / "checkpoints").iterdir())[-1])]) == 0
    assert f"top-1 {from_run['top1']:.2f} %" in capsys.readouterr().out

    assert main(["report", str(run), "--output", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "index.html").is_file()


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"torch", "DALI"} <= {word for finding in findings for word in finding["name"].split()} | {
        finding["area"] for finding in findings
    }
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("128,64,4096,10", "reference for B 128, d 64"), ("256,512,65536,1000", "chunked for")],
)
def test_doctor_says_which_loss_it_would_take(capsys, monkeypatch, shape, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor", "--json", "--loss-shape", shape, "--posterior", "ids"]) == 0
    (finding,) = [f for f in json.loads(capsys.readouterr().out) if f["name"] == "kdav_loss impl=auto"]
    assert expected in finding["detail"]
    assert "ids on cpu: batch x length" in finding["detail"]


def test_doctor_refuses_a_shape_that_is_none(capsys):
    for text in ("256,512", "a,b,c,d", "0,1,1,1"):
        assert "give batch, embedding width, memory length" in fails(capsys, "doctor", "--loss-shape", text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=0.1"], "unknown key 'optimizer.lrr'; the nearest known one is 'optimizer.lr'"),
        (["trian.epochs=3"], "unknown key 'trian'; the nearest known one is 'train'"),
        (["train.epochs=many"], "'train.epochs' is 'many'"),
        (["train.batch_size=0"], "'train.batch_size' is 0"),
        (["train.epochs"], "is not of the form key=value"),
        (["data.root=/nowhere/at/all"], "/nowhere/at/all is not a folder"),
        (["distiller.name=kd"], "distiller.name is 'kd', but 'kdav train' learns from labels only"),
        (["distiller.name=magic"], "distiller.name is 'magic'; allowed: 'none', "),
        (["model.name=cifar:resnet21"], "unknown model 'cifar:resnet21'; the nearest known ones are"),
        (
            ["train.batch_size=10", "train.accumulate=3"],
            "train.batch_size (10) is not a multiple of train.accumulate",
        ),
        (["model.checkpoint=missing.safetensors"], "missing.safetensors"),
        (["device=tpu"], "'device' is 'tpu'"),
        (["data.workers=100000"], "'data.workers' is 100000; allowed: "),
    ],
)
def test_bad_configs(config, capsys, tmp_path, overrides, message):
    teacher = {"name": "cifar:resnet8", "checkpoint": "teacher"}
    path = config(teacher=teacher)
    assert message in fails(capsys, "train", path, *SMALL, *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["destil"], "invalid choice: 'destil'"),
        (["train"], "CONFIG"),
        (["evaluate", "run", "--jsn"], "unrecognized arguments: --jsn"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_bad_command_lines(capsys, arguments, message):
    line = fails(capsys, *arguments)
    assert message in line
    assert "--help" in line


def test_bad_config_files(capsys, tmp_path):
    assert "No such file" in fails(capsys, "train", str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [1, 2")
    assert "is not valid YAML" in fails(capsys, "train", str(broken))
    broken.write_text("- a list")
    assert "holds a list" in fails(capsys, "train", str(broken))


@pytest.fixture
def damaged(images, tmp_path):
    """A copy of the image folder to be damaged."""
    return shutil.copytree(images, tmp_path / "damaged")


def test_empty_class_folder(config, damaged, capsys):
    (damaged / "train" / "emu").mkdir()
    message = fails(capsys, "train", config(), *SMALL, f"data.root={damaged}")
    assert "train/emu holds no images" in message


def test_class_lists_that_differ(config, damaged, capsys):
    shutil.move(damaged / "val" / "dog", damaged / "val" / "wolf")
    message = fails(capsys, "train", config(), *SMALL, f"data.root={damaged}")
    assert "only train/ has 'dog'" in message
    assert "only val/ has 'wolf'" in message


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_truncated_jpeg_is_named(config, damaged, capsys, tmp_path, loader):
    victim = damaged / "train" / "cat" / "3.jpg"
    victim.write_bytes(victim.read_bytes()[:-40])
    message = fails(capsys, "train", config(), *SMALL, f"data.root={damaged}", f"data.loader={loader}")
    assert "train/cat/3.jpg (truncated)" in message
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_architecture(config, capsys, tmp_path):
    assert main(["train", config(), *SMALL]) == 0
    capsys.readouterr()
    overrides = [f"model.checkpoint={tmp_path / 'run'}", "model.width=0.5", f"run_dir={tmp_path / 'other'}"]
    message = fails(capsys, "train", config(), *SMALL, *overrides)
    assert "conv1.weight is 4 x 3 x 3 x 3, needed 8 x 3 x 3 x 3" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lr=1",
            "optimizer.lr has no effect on an evaluation; these have: data.check, data.crop, ",
        ),
        ("model.name=cifar:resnet14", "model.name has no effect"),
        ("train={batch_size: 4, epochs: 2}", "train.epochs has no effect"),
        ("data.train_subset=3", "data.train_subset has no effect"),
        ("data.mean=[0.5,0.5,0.5]", "data.mean has no effect on an evaluation; weights go with the mean"),
        ("data={name: digits, mean: [0.5,0.5,0.5], std: [1,1,1]}", "data.mean has no effect"),
        ("run_dir=elsewhere", "run_dir has no effect"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'"),
        ("train.batch_size=0", "'train.batch_size' is 0"),
    ],
)
def test_evaluate_refuses_what_has_no_effect(teacher_run, capsys, override, message):
    assert message in fails(capsys, "evaluate", str(teacher_run), override)


def test_evaluate_heeds_what_has_an_effect(teacher_run, capsys):
    overrides = [
        "device=cpu",
        "train.batch_size=100",
        "train.precision=bf16",
        "data.workers=1",
        "data.check=ends",
    ]
    assert main(["evaluate", str(teacher_run), "--json", *overrides, "data.layout=contiguous"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 900


def test_a_loss_that_is_not_a_number_is_null_in_json(teacher_run, capsys, monkeypatch):
    answer = (evaluate.Accuracy(10.0, 50.0, math.nan, 900), None)
    monkeypatch.setattr(evaluate, "evaluate_trained", lambda *_: answer)
    assert main(["evaluate", str(teacher_run), "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert (found["top1"], found["loss"], found["images"]) == (10.0, None, 900)
    assert "NaN" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_cannot_be_written_is_no_success(teacher_run, capsys, monkeypatch):
    answer = (evaluate.Accuracy(10.0, 50.0, 1.0, 900), None)
    monkeypatch.setattr(evaluate, "evaluate_trained", lambda *_: answer)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["evaluate", str(teacher_run), "--json"]) == 2
    assert (
        capsys.readouterr().err
        == "kdav: error: cannot write the output: No space left on device; make room\n"
    )


def test_too_little_memory_is_one_line(teacher_run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_trained", lambda *_: bytearray(1 << 61))
    assert main(["evaluate", str(teacher_run)]) == 2
    assert capsys.readouterr().err.startswith(
        "kdav: error: not enough memory (MemoryError); lower train.batch_size"
    )


def test_version_names_what_results_depend_on_without_importing_it():
    program = (
        "import sys; from kdav_fast.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert next(iter(lines)) == "kdav_fast"
    for package in ("torch", "deepspeed", "triton", "nvidia-dali-cuda130"):
        assert lines[package] == metadata.version(package)


def test_evaluate_bad_sources(capsys, tmp_path):
    assert "nothing.safetensors" in fails(capsys, "evaluate", str(tmp_path / "nothing.safetensors"))
    assert "holds neither student.safetensors nor" in fails(capsys, "evaluate", str(tmp_path))
    assert "holds neither student.safetensors nor" in fails(capsys, "export", str(tmp_path))
    assert "metrics.jsonl" in fails(capsys, "report", str(tmp_path / "no-run"))


def test_evaluate_on_other_classes(config, damaged, capsys, tmp_path):
    assert main(["train", config(), *SMALL]) == 0
    capsys.readouterr()
    (damaged / "val" / "dog").rename(damaged / "val" / "emu")
    message = fails(capsys, "evaluate", str(tmp_path / "run"), f"data.root={damaged}")
    assert "has 2 classes (cat, emu), but" in message
    assert "knows 2 (cat, dog)" in message


def test_help_and_bad_configs_do_not_load_torch():
    program = (
        "import sys; from kdav_fast.cli import main\n"
        "code = main(['train', 'nowhere.yaml'])\n"
        "sys.exit(code if 'torch' not in sys.modules else 1)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr


@pytest.mark.parametrize("command", [["evaluate"], ["distill"], ["data", "check"]])
def test_only_what_must_be_given_is_asked_for(capsys, command):
    message = fails(capsys, *command)
    assert "arguments are required" in message
    assert "key=value" not in message
