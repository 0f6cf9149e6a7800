"""The same student however many processes train it and however far its state is sharded.

One table: every ZeRO stage on 1, 2 and 4 processes, and the options that change how the work is divided, against one
process at stage 0. Losses differ by float32's rounding in sums of another order, which training amplifies: by at most
2e-4 of the loss over the 8 steps here, at the first step by 2e-6.
"""

import pytest
import torch
from safetensors.torch import load_file

from kdav_fast.config import dump_config
from kdav_fast.tracking.metrics_log import read_metrics
from tests.train import processes

BASES = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "clip-adamw": {"clip_grad_norm": 0.5},
    "ema-mix": {"ema_decay": 0.5},
}
"""Runs that compute something different from one another; the table compares each with itself on one process."""
ROWS = {
    "plain": [
        ("zero0", {}),
        ("zero1", {"zero_stage": 1}),
        ("zero2", {"zero_stage": 2}),
        ("zero3", {"zero_stage": 3}),
    ],
    "accumulate": [("zero0", {}), ("zero2", {"zero_stage": 2}), ("zero3", {"zero_stage": 3})],
    "clip-adamw": [("zero0", {}), ("zero1", {"zero_stage": 1}), ("zero3", {"zero_stage": 3})],
    "ema-mix": [("zero0", {}), ("zero3", {"zero_stage": 3})],
}


@pytest.fixture(scope="module")
def table(small_config, teacher_run, tmp_path_factory):
    """Trains all rows on some number of processes; returns the losses of each, and its run folder."""
    folder = tmp_path_factory.mktemp("sharding")

    def train(world: int):
        runs = {}
        for base, changes in BASES.items():
            for row, sharding in ROWS[base]:
                config = small_config(
                    folder / f"{world}-{base}-{row}",
                    teacher={
                        "name": "cifar:resnet8",
                        "checkpoint": str(teacher_run),
                        "sharded": row == "zero3",
                    },
                    distiller={"name": "kdav", "memory_length": 100},
                    data={"crop": "none"},
                    optimizer={"name": "adamw", "lr": 0.005} if "adamw" in base else {},
                    train={"epochs": 1, "log_every": 1, "sync_batchnorm": True, **changes, **sharding},
                )
                file = folder / f"{config.run_dir.name}.yaml"
                file.write_text(dump_config(config))
                runs[base, row] = (file, config.run_dir)
        processes.run(
            [str(processes.REPOSITORY / "tests/train/train_each.py"), *[str(f) for f, _ in runs.values()]],
            world,
        )
        return {key: (_losses(run_dir), run_dir) for key, (_, run_dir) in runs.items()}

    return train


def _losses(run_dir):
    return [line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line]


@pytest.fixture(scope="module")
def alone(table):
    return table(1)


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 4))])
def test_losses_and_students_are_equal(table, alone, world):
    found = alone if world == 1 else table(world)
    for (base, row), (losses, run_dir) in found.items():
        expected, reference = alone[base, "zero0"]
        assert len(losses) == len(expected) == 8
        assert losses[0] == pytest.approx(expected[0], rel=2e-6), (base, row)
        assert losses == pytest.approx(expected, rel=2e-4), (base, row)
        student, other = (load_file(run / "student.safetensors") for run in (run_dir, reference))
        assert student.keys() == other.keys()
        for name, tensor in student.items():
            torch.testing.assert_close(tensor, other[name], rtol=2e-2, atol=2e-3, msg=f"{base} {row} {name}")
