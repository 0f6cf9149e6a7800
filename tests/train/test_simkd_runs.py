"""Whole runs of SimKD: the teacher's classifier reaches the student, its file and the exported network."""

import pytest
import torch
from safetensors.torch import load_file

from kdav_fast.config import Config
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.models import build_stock
from kdav_fast.student.export import export_safetensors
from kdav_fast.student.file import read_student
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train.loop import run_training
from tests.train.interrupt import stop_after


@pytest.fixture
def simkd_config(small_config, teacher_run, tmp_path):
    def build(name: str, **changes) -> Config:
        sections = {
            "teacher": {"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            "distiller": {"name": "simkd", "weight_kl": 0.5},
            **changes,
        }
        return small_config(tmp_path / name, **sections)

    return build


def check_classifier(run_dir, teacher_run):
    """The run kept the teacher's classifier, bit by bit, and its student's is that one after the projector."""
    teacher, student = (load_file(run / "student.safetensors") for run in (teacher_run, run_dir))
    last = max((run_dir / "checkpoints").glob("step-*"))
    head = {
        key.removeprefix("student.head."): tensor
        for key, tensor in load_file(last / "buffers-00000.safetensors").items()
    }
    for name in ("weight", "bias"):
        assert torch.equal(head[f"classifier_{name}"], teacher[f"fc.{name}"])
    pieces = load_file(last / "pieces-00000.safetensors")
    weight, scale, shift = (
        pieces[f"weight:student.head.{name}:0"].double()
        for name in ("projector.weight", "norm.weight", "norm.bias")
    )
    scale = scale / (head["norm.running_var"].double() + 1e-5).sqrt()
    projector = scale[:, None] * weight.view(len(scale), -1)
    shift = shift - scale * head["norm.running_mean"].double()
    expected = {
        "fc.weight": teacher["fc.weight"].double() @ projector,
        "fc.bias": teacher["fc.weight"].double() @ shift + teacher["fc.bias"].double(),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(student[name].double(), tensor, rtol=1e-6, atol=1e-6)


def test_trains_and_its_export_in_the_stock_architecture_answers_the_same(simkd_config, teacher_run):
    config = simkd_config("run", distiller={"name": "simkd"})
    accuracy = run_training(config)
    losses = [line["train/loss/feature_mse"] for line in read_metrics(config.run_dir) if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    check_classifier(config.run_dir, teacher_run)

    exported = config.run_dir / "export" / "student.safetensors"
    assert export_safetensors(config.run_dir, exported) < 1e-4
    stock = build_stock("cifar:resnet8", 10, width=0.25).eval()
    stock.load_state_dict(load_file(exported), strict=True)
    student, _ = read_student(config.run_dir)
    images = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(stock(images), student(images).logits, rtol=1e-4, atol=1e-4)
    assert evaluate_file(exported).top1 == evaluate_file(config.run_dir).top1 == accuracy.top1


def test_stopped_and_continued_equals_never_stopped(simkd_config, monkeypatch):
    """With mixed images, whose labels it does not need, and an average of the student."""
    changes = {"train": {"epochs": 2, "mixup": 0.4, "ema_decay": 0.9}}
    whole, config = simkd_config("whole", **changes), simkd_config("stopped", **changes)
    run_training(whole)
    stop_after(monkeypatch, 11)
    assert run_training(config) is None
    stop_after(monkeypatch, 1000)
    assert run_training(config) is not None
    expected, continued = (load_file(c.run_dir / "student.safetensors") for c in (whole, config))
    assert expected.keys() == continued.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in continued.items())


def test_sharded_student_and_teacher_train_as_whole_ones(simkd_config, teacher_run):
    losses = []
    for name, stage in {"whole": 0, "sharded": 3}.items():
        teacher = {"name": "cifar:resnet8", "checkpoint": str(teacher_run), "sharded": stage == 3}
        train = {"epochs": 1, "zero_stage": stage, "log_every": 1}
        config = simkd_config(name, teacher=teacher, data={"crop": "none"}, train=train)
        run_training(config)
        check_classifier(config.run_dir, teacher_run)
        losses.append([line["train/loss"] for line in read_metrics(config.run_dir) if "train/loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
