"""Whole runs on the digits: every method and option, what a run leaves behind, and restarts."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdav_fast.errors import InputError
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.models import build_stock
from kdav_fast.student.file import read_student
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train import loop
from kdav_fast.train.loop import run_training
from tests.data.sources.small_archives import CLASSES, FOLDERS, files_of, truth_of, write_tar
from tests.train.interrupt import stop_after


@pytest.fixture(scope="session")
def kdav_sections(teacher_run):
    teacher = {"name": "cifar:resnet8", "checkpoint": str(teacher_run)}
    return {"teacher": teacher, "distiller": {"name": "kdav", "memory_length": 100}}


def test_a_run_folder_holds_what_the_design_promises(small_config, kdav_sections, tmp_path):
    config = small_config(tmp_path / "run", **kdav_sections)
    accuracy = run_training(config)
    run = config.run_dir
    assert (run / "config.yaml").is_file()
    assert list((run / "tensorboard").glob("events.*"))
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == [
        "step-00000016",
        "step-00000024",
    ]
    assert (run / "report" / "index.html").is_file()
    assert list((run / "report").glob("*.png"))
    assert all(p.suffix != ".tmp" for p in run.rglob("*"))

    lines = read_metrics(run)
    training = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "val/top1" in line]
    assert [line["step"] for line in training] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [line["step"] for line in evaluations] == [8, 16, 24]
    for key in ("train/loss/membership_kl", "train/loss/prediction_kl", "train/top1", "train/top5", "lr"):
        assert key in training[0]
    for line in training:
        parts = line["train/loss/membership_kl"] + line["train/loss/prediction_kl"]
        assert line["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert evaluations[-1]["val/images"] == 900
    assert evaluations[-1]["val/top1"] == accuracy.top1
    assert training[-1]["train/loss"] < training[0]["train/loss"]

    student, card = read_student(run)
    assert (card.step, card.epoch, card.distiller, card.classes) == (24, 3.0, "kdav", tuple("0123456789"))
    assert not card.probabilistic  # cosines with the class prototypes
    assert student.head is None  # folded: the stock architecture
    stock = build_stock("cifar:resnet8", 10)
    assert load_file(run / "student.safetensors").keys() == stock.state_dict().keys()


def test_every_way_of_loading_trains_the_same_student(small_config, tmp_path):
    """Without augmentation the digits' pixels are the same, however they are loaded."""
    losses = []
    for name, data in {
        "dali": {"loader": "dali"},
        "torchvision": {"loader": "torchvision"},
        "resident": {"resident": True},
        "resident-torchvision": {"resident": True, "loader": "torchvision"},
        "contiguous": {"layout": "contiguous"},
    }.items():
        config = small_config(
            tmp_path / name, data={**data, "crop": "none"}, train={"epochs": 2, "log_every": 1}
        )
        run_training(config)
        losses.append([line["train/loss"] for line in read_metrics(config.run_dir) if "train/loss" in line])
    assert len(losses[0]) == 16
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=2e-3)


def test_a_run_on_a_published_archive_is_evaluated_and_continued_there(small_config, tmp_path):
    archive, folder = next(iter(FOLDERS["cifar10"].items()))
    write_tar(tmp_path / archive, folder, files_of("cifar10", archive))
    data = {
        "name": "cifar10",
        "root": str(tmp_path),
        "image_size": 32,
        "crop_padding": 4,
        "train_subset": None,
    }
    config = small_config(tmp_path / "run", data=data, train={"epochs": 1, "batch_size": 4})
    accuracy = run_training(config)
    assert accuracy.images == len(truth_of("cifar10")["test"][1])
    assert read_student(config.run_dir)[1].classes == CLASSES["cifar10"]
    assert evaluate_file(config.run_dir, ["device=cpu"]) == accuracy
    assert run_training(config) == accuracy


def test_half_precision_images_need_networks_that_take_them(small_config, tmp_path):
    with pytest.raises(
        InputError, match=r"data\.dtype is 'bf16' but train\.precision lets the networks compute in fp32"
    ):
        run_training(small_config(tmp_path / "run", data={"dtype": "bf16"}))
    for dtype in ("bf16", "fp16"):
        config = small_config(
            tmp_path / dtype, data={"dtype": dtype}, train={"epochs": 1, "precision": dtype, "mixup": 0.2}
        )
        assert run_training(config).images == 900


@pytest.mark.parametrize(
    "changes",
    [
        {"distiller": {"name": "kd"}},
        {"distiller": {"name": "kdav", "posterior": "ids", "prototypes": "running", "center": False}},
        {"distiller": {"name": "kdav"}, "train": {"mixup": 0.5, "cutmix": 0.5, "ema_decay": 0.5}},
        {"distiller": {"name": "kd"}, "train": {"label_smoothing": 0.1, "zero_stage": 1, "accumulate": 2}},
        {
            "distiller": {"name": "kdav"},
            "train": {"zero_stage": 2, "clip_grad_norm": 1.0, "precision": "bf16"},
        },
        {
            "distiller": {"name": "kdav"},
            "train": {"zero_stage": 3, "precision": "fp16", "sync_batchnorm": True, "ema_decay": 0.5},
        },
        {
            "distiller": {"name": "none"},
            "data": {"loader": "torchvision"},
            "optimizer": {"name": "adamw", "lr": 0.01},
        },
        pytest.param(
            {"distiller": {"name": "none"}, "model": {"compile": True}, "schedule": {"name": "one_cycle"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "kd",
        "kdav-running-ids",
        "mixing-ema",
        "zero1-accumulate",
        "zero2-bf16",
        "zero3-fp16",
        "torchvision-adamw",
        "compile",
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_options_train(small_config, kdav_sections, tmp_path, changes):
    teacher = {} if changes["distiller"]["name"] == "none" else {"teacher": kdav_sections["teacher"]}
    config = small_config(tmp_path / "run", **teacher, **changes)
    run_training(config)
    losses = [line["train/loss"] for line in read_metrics(config.run_dir) if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_the_teacher_is_bitwise_unchanged(small_config, kdav_sections, tmp_path, monkeypatch):
    seen = {}
    original = loop.train

    def watching(run, *arguments):
        seen["before"] = {name: t.clone() for name, t in run.teacher.state_dict().items()}
        finished = original(run, *arguments)
        seen["after"] = run.teacher.state_dict()
        return finished

    monkeypatch.setattr(loop, "train", watching)
    run_training(small_config(tmp_path / "run", **kdav_sections, train={"epochs": 1}))
    assert seen["before"].keys() == seen["after"].keys()
    assert all(torch.equal(seen["before"][name], tensor) for name, tensor in seen["after"].items())


def test_loss_equals_a_run_written_out_in_plain_torch(small_config, kdav_sections, tmp_path):
    """The first epoch of KDAV, step by step, without engine, loop or distiller."""
    import torch.nn.functional as F

    from kdav_fast import EmbeddingHead, kdav_loss
    from kdav_fast.models import build_classifier
    from kdav_fast.runtime.processes import start_cluster
    from kdav_fast.train.setup import set_up

    changes = {"train": {"epochs": 1, "log_every": 1}, "schedule": {"name": "constant"}}
    run_training(small_config(tmp_path / "run", **kdav_sections, **changes))
    logged = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]

    run = set_up(small_config(tmp_path / "other", **kdav_sections, **changes), start_cluster("cpu"))
    teacher = run.teacher.network
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    head = EmbeddingHead(network.feature_width, teacher.feature_width, 10)
    head.load_state_dict(run.student.head.state_dict())
    network.load_stock_state_dict(run.student.network.stock_state_dict())
    with torch.no_grad():
        center = torch.cat([teacher(b.images).features[b.valid] for b in run.loaders.measure()]).mean(0)
    optimizer = torch.optim.SGD(
        [*network.backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4
    )
    memory, posterior = torch.zeros(0, teacher.feature_width), torch.zeros(0, 10)
    for batch, expected in zip(run.loaders.train, logged, strict=True):
        with torch.no_grad():
            t = teacher(batch.images)
        embedding = (t.features - center)[batch.valid]
        memory = torch.cat([memory, F.normalize(embedding, dim=1)])[-100:]
        posterior = torch.cat([posterior, t.logits[batch.valid].softmax(1)])[-100:]
        z = head(network.backbone(batch.images))[batch.valid]
        loss = kdav_loss(z, embedding, t.logits[batch.valid], memory, posterior).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_stopped_and_continued_equals_never_stopped(
    small_config, kdav_sections, tmp_path, monkeypatch, loader
):
    changes = {**kdav_sections, "data": {"loader": loader}, "train": {"mixup": 0.4, "ema_decay": 0.9}}
    run_training(small_config(tmp_path / "whole", **changes))
    config = small_config(tmp_path / "stopped", **changes)
    stop_after(monkeypatch, 13)
    assert run_training(config) is None
    assert not (config.run_dir / "student.safetensors").exists()
    saved = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))
    assert saved == ["step-00000008", "step-00000013"]
    stop_after(monkeypatch, 1000)
    assert run_training(config) is not None

    whole, stopped = (load_file(tmp_path / run / "student.safetensors") for run in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    lines = read_metrics(config.run_dir)
    keys = [(line["step"], "val/top1" in line) for line in lines]
    assert len(keys) == len(set(keys))
    by_step = {(line["step"], "val/top1" in line): line for line in read_metrics(tmp_path / "whole")}
    for key, line in zip(keys, lines, strict=True):
        # The interval in which the run was stopped spans only the steps after it.
        if "train/loss" in line and line["step"] != 15:
            assert line["train/loss"] == by_step[key]["train/loss"]
        if "val/top1" in line:
            assert line["val/top1"] == by_step[key]["val/top1"]


def test_a_finished_run_is_not_trained_again(small_config, tmp_path, capsys):
    config = small_config(tmp_path / "run", train={"epochs": 1, "save_every": 0})
    first = run_training(config)
    before = (config.run_dir / "metrics.jsonl").read_text()
    assert run_training(config) == first
    assert "is complete: 8 steps" in capsys.readouterr().out
    assert (config.run_dir / "metrics.jsonl").read_text() == before


def test_the_folder_of_another_config_is_refused_and_kept(small_config, tmp_path):
    config = small_config(tmp_path / "run", train={"epochs": 1})
    run_training(config)
    before = {p: p.read_bytes() for p in config.run_dir.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="belongs to another config: optimizer.lr is 0.1 there and 0.2 here"):
        run_training(small_config(tmp_path / "run", train={"epochs": 1}, optimizer={"lr": 0.2}))
    assert before == {p: p.read_bytes() for p in config.run_dir.rglob("*") if p.is_file()}


def test_a_key_that_the_folders_version_did_not_know_has_its_default(small_config, tmp_path, capsys):
    config = small_config(tmp_path / "run", train={"epochs": 1})
    run_training(config)
    file = config.run_dir / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    del saved["model"]["init"], saved["train"]["keep_freed_memory"]
    file.write_text(yaml.safe_dump(saved))
    run_training(config)
    assert "is complete: 8 steps" in capsys.readouterr().out
    with pytest.raises(InputError, match="model.init is 'published' there and 'torch' here"):
        run_training(small_config(tmp_path / "run", train={"epochs": 1}, model={"init": "torch"}))
    saved["train"]["forgotten"] = 1
    file.write_text(yaml.safe_dump(saved))
    with pytest.raises(
        InputError, match=r"run cannot be continued: .*train\.forgotten.*; use another run_dir"
    ):
        run_training(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"name": "cifar:resnet8"}, "distiller": {"name": "kd"}}, "the teacher has no weights"),
        ({"data": {"train_subset": 9999}}, "data.train_subset is 9999"),
        ({"data": {"name": "folder", "root": "nowhere"}}, "nowhere is not a folder"),
        (
            {"distiller": {"name": "kdav", "impl": "triton"}},
            "distiller.impl is 'triton' but the device is 'cpu'",
        ),
        ({"model": {"name": "cifar:resnet9"}}, "unknown model 'cifar:resnet9'"),
    ],
)
def test_bad_input_leaves_no_run_folder(small_config, kdav_sections, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run_training(small_config(tmp_path / "run", **{"teacher": kdav_sections["teacher"], **changes}))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_architecture_names_its_tensors(small_config, teacher_run, tmp_path):
    teacher = {"name": "cifar:resnet14", "checkpoint": str(teacher_run)}
    with pytest.raises(InputError, match=r"teacher\.checkpoint .*student\.safetensors.* is missing"):
        run_training(small_config(tmp_path / "run", teacher=teacher, distiller={"name": "kd"}))


def test_a_teacher_of_other_classes_is_refused(small_config, teacher_run, tmp_path):
    from kdav_fast.student.file import write_student

    student, card = read_student(teacher_run)
    other = tmp_path / "other.safetensors"
    write_student(other, student.weights(), card.model_copy(update={"classes": tuple("abcdefghij")}))
    teacher = {"name": "cifar:resnet8", "checkpoint": str(other)}
    with pytest.raises(InputError, match="trained for other classes than the data's \\('a' there, '0' here"):
        run_training(small_config(tmp_path / "run", teacher=teacher, distiller={"name": "kd"}))


def test_one_line_of_metrics_is_flat_json(teacher_run):
    for text in (teacher_run / "metrics.jsonl").read_text().splitlines():
        assert all(not isinstance(value, (dict, list)) for value in json.loads(text).values())
