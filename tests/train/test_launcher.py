"""Two processes on this machine, and DeepSpeed's launcher: `deepspeed --num_accelerators 2 launch/distill.py`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kdav_fast import EmbeddingHead
from kdav_fast.config import dump_config
from kdav_fast.data import build_loaders, open_images
from kdav_fast.distillers.memories.ring import TeacherMemory
from kdav_fast.errors import InputError
from kdav_fast.models import IMAGENET
from kdav_fast.student.file import read_student
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train.loop import run_training
from tests.train import processes

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = "launch/distill.py"
LAST = "checkpoints/step-00000010"
CPU = torch.device("cpu")


def configured(config) -> Path:
    """The config's file, beside its run folder."""
    file = config.run_dir.with_suffix(".yaml")
    file.write_text(dump_config(config))
    return file


def launch(config, *overrides: str) -> subprocess.CompletedProcess:
    """Run a config in two processes under the deepspeed launcher with one thread a process."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        str(launcher),
        "--num_accelerators",
        "2",
        "--master_port",
        str(29500 + os.getpid() % 1000),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"  # it starts `python` by name
    return subprocess.run(
        [*command, PROGRAM, str(configured(config)), *overrides],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def two_process_run(small_config, teacher_run, tmp_path_factory):
    config = small_config(
        tmp_path_factory.mktemp("launcher") / "run",
        teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
        distiller={"name": "kdav", "memory_length": 500, "center": True},
        data={"train_subset": 150, "crop": "none"},
        train={"epochs": 2, "log_every": 1, "seed": 5},
    )
    return config, processes.run([PROGRAM, str(configured(config))], 2)


def rank_loaders(config, rank, world=2):
    data = config.data
    return build_loaders(
        data,
        open_images(data, config.train.seed),
        batch_size=config.train.batch_size // world,
        eval_batch_size=64,
        device=CPU,
        rank=rank,
        world=world,
        local_world=world,
        seed=config.train.seed,
        normalization=IMAGENET,
    )


def buffers_of(checkpoint, rank=0):
    """What a rank has measured: of the trained head its centre, among others."""
    return load_file(checkpoint / f"buffers-0000{rank}.safetensors")


def memory_of(config, checkpoint):
    """The teacher's memory in a checkpoint folder."""
    state = load_file(checkpoint / "distiller.safetensors")
    width = len(buffers_of(checkpoint)["student.head.center"])
    memory = TeacherMemory(config.distiller.memory_length, width, classes=10)
    memory.load_state_dict({name.removeprefix("memory."): tensor for name, tensor in state.items()})
    return memory


def test_the_memory_holds_both_ranks_rows_in_rank_order(two_process_run, teacher_run):
    config, _ = two_process_run
    checkpoint = config.run_dir / LAST
    memory, center = memory_of(config, checkpoint), buffers_of(checkpoint)["student.head.center"]
    teacher, _ = read_student(teacher_run)
    loaders = [rank_loaders(config, rank).train for rank in range(2)]
    expected = []
    with torch.no_grad():
        for _ in range(2):
            for pair in zip(*loaders, strict=True):
                for batch in pair:
                    features = teacher(batch.images).features[batch.valid] - center
                    expected.append(F.normalize(features, dim=1))
    expected = torch.cat(expected)
    assert len(expected) == 300  # two epochs of 150 images, padding left out
    assert memory.filled == memory.cursor == 300
    torch.testing.assert_close(memory.embedding[:300], expected, rtol=1e-4, atol=1e-4)


def test_the_centre_is_the_mean_over_both_ranks(two_process_run, teacher_run):
    config, _ = two_process_run
    teacher, _ = read_student(teacher_run)
    with torch.no_grad():
        features = [teacher(b.images).features[b.valid] for b in rank_loaders(config, 0, world=1).measure()]
    mean = torch.cat(features).mean(0)
    for rank in range(2):
        center = buffers_of(config.run_dir / LAST, rank)["student.head.center"]
        torch.testing.assert_close(center, mean, rtol=1e-4, atol=1e-5)


def test_what_is_saved_has_the_mean_of_both_ranks_batchnorm_statistics(two_process_run):
    config, _ = two_process_run
    checkpoint = config.run_dir / LAST
    ranks = [buffers_of(checkpoint, rank) for rank in range(2)]
    student = load_file(checkpoint / "student.safetensors")
    compared = 0
    for name, saved in student.items():
        if name.endswith(("running_mean", "running_var")):
            own = [rank[f"student.network.backbone.{name}"] for rank in ranks]
            assert not torch.equal(*own)
            torch.testing.assert_close(saved, (own[0] + own[1]) / 2, rtol=1e-6, atol=1e-7)
            compared += 1
    assert compared == 18  # ResNet-8's nine layers
    # The head's layer is in the classifier that it folds into.
    pieces = [load_file(checkpoint / f"pieces-0000{rank}.safetensors") for rank in range(2)]
    weights = pieces[0] | pieces[1]
    head = EmbeddingHead(16, 64, 10)
    for name, tensor in head.state_dict().items():
        trained = weights.get(f"weight:student.head.{name}:0")
        own = [rank.get(f"student.head.{name}") for rank in ranks]
        tensor.copy_((own[0] + own[1]) / 2 if trained is None else trained.view_as(tensor))
    assert not torch.equal(*(rank["student.head.norm.running_var"] for rank in ranks))
    torch.testing.assert_close(student["fc.weight"], head.fold().weight, rtol=1e-6, atol=1e-7)


def test_one_process_writes_and_evaluates_all_images(two_process_run):
    config, texts = two_process_run
    lines = read_metrics(config.run_dir)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 11))  # 5 steps an epoch: 75 images a rank in batches of 16
    evaluations = [line for line in lines if "val/top1" in line]
    assert [line["val/images"] for line in evaluations] == [900, 900]
    assert "".join(texts).count("top-1") == 1


@pytest.mark.slow
def test_deepspeed_s_launcher_starts_the_same_run(two_process_run, tmp_path):
    config, _ = two_process_run
    launched = config.model_copy(update={"run_dir": tmp_path / "run"})
    result = launch(launched)
    assert result.returncode == 0, result.stdout + result.stderr
    students = [(each.run_dir / "student.safetensors").read_bytes() for each in (config, launched)]
    assert students[0] == students[1]


def test_one_process_continues_what_two_began_only_if_told_to(two_process_run, tmp_path):
    config, _ = two_process_run
    run_dir = tmp_path / "run"
    shutil.copytree(config.run_dir, run_dir)
    (run_dir / "student.safetensors").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step-00000010")
    alone = config.model_copy(update={"run_dir": run_dir})
    with pytest.raises(
        InputError, match=r"by 2 processes and this run has 1; .*data\.on_reshard=restart_epoch"
    ):
        run_training(alone)
    data = config.data.model_copy(update={"on_reshard": "restart_epoch"})
    accuracy = run_training(alone.model_copy(update={"data": data}))
    assert accuracy.images == 900
    ours, theirs = (memory_of(config, folder / LAST) for folder in (run_dir, config.run_dir))
    assert ours.cursor == 300
    # The second epoch takes the same images in the same steps as it did with two processes.
    for ours_of_step, theirs_of_step in zip(
        *(m.embedding[150:300].split(32) for m in (ours, theirs)), strict=True
    ):
        distance = (ours_of_step[:, None] - theirs_of_step[None]).norm(dim=2)
        assert max(distance.amin(0).max(), distance.amin(1).max()) < 1e-4


BAD_BATCH = (
    "kdav: error: train.batch_size is 33; with 2 processes and train.accumulate=1 it must be a multiple of 2"
)


def test_bad_input_is_one_line_and_exit_code_2_on_two_processes(small_config, tmp_path):
    file = configured(small_config(tmp_path / "run"))
    group = processes.fork([PROGRAM, str(file), "train.batch_size=33"], 2)
    lines = "".join(processes.outputs(group)).splitlines()
    assert [process.returncode for process in group] == [2, 2], lines
    assert [line for line in lines if "kdav: error" in line] == [BAD_BATCH]


@pytest.mark.slow
def test_the_launcher_hands_on_the_line_and_the_exit_code(small_config, tmp_path):
    result = launch(small_config(tmp_path / "run"), "train.batch_size=33")
    assert result.returncode == 2, result.stdout + result.stderr
    errors = [line for line in (result.stdout + result.stderr).splitlines() if "kdav: error" in line]
    assert errors == [BAD_BATCH]
