"""Each way of computing faster trains alike: equal losses from equal weights on equal batches."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters

from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.phases import PhasePosition, run_phases
from kdav_fast.train.setup import set_up
from kdav_fast.train.step import PARTS, take_step

STEPS = 6
GENTLE = {"optimizer": {"lr": 0.01}, "schedule": {"name": "constant"}}
"""Training magnifies roundings at a larger learning rate."""


@pytest.fixture
def losses_of(small_config, teacher_run, tmp_path):
    """Losses of the first steps of a run with the given sections."""
    folders = (tmp_path / str(i) for i in itertools.count())

    def losses(name="kdav", teacher=None, **sections):
        distiller = {"name": name, **({"memory_length": 100} if name == "kdav" else {})}
        section = {"name": "cifar:resnet8", "checkpoint": str(teacher_run), **(teacher or {})}
        config = small_config(next(folders), distiller=distiller, teacher=section, **GENTLE, **sections)
        run = set_up(config, start_cluster("cpu"))
        assert run_phases(run, PhasePosition(), lambda position, save_due, values: False)
        run.start_engine()
        run.trainee.train()
        batches = itertools.cycle(list(run.loaders.train))
        seen = []
        for step in range(STEPS):
            taken, (micro_batch,) = take_step(run, batches, step)
            assert taken
            seen.append(micro_batch.answer.total.item())
        return torch.tensor(seen)

    return losses


def assert_same_training(losses, truth):
    """Equal but for roundings, which each step magnifies."""
    torch.testing.assert_close(losses[:1], truth[:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[1:3], truth[1:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[3:], truth[3:], rtol=5e-3, atol=1e-5)


def test_half_precision(losses_of):
    plain, half = losses_of(), losses_of(train={"precision": "bf16", "epochs": 1})
    assert not torch.equal(plain, half)
    torch.testing.assert_close(half, plain, rtol=3e-2, atol=1e-3)


def test_a_teacher_in_half_precision(losses_of):
    plain, half = losses_of(), losses_of(teacher={"precision": "bf16"})
    assert not torch.equal(plain, half)  # it did compute otherwise
    torch.testing.assert_close(half, plain, rtol=2e-2, atol=1e-3)


def test_a_teacher_in_full_precision_beside_a_student_in_half(losses_of):
    half = {"train": {"precision": "bf16", "epochs": 1}}
    both, student_only = losses_of(**half), losses_of(teacher={"precision": "fp32"}, **half)
    assert not torch.equal(both, student_only)
    torch.testing.assert_close(student_only, both, rtol=3e-2, atol=1e-3)


def test_half_precision_images_need_a_teacher_that_takes_them(losses_of):
    with pytest.raises(
        InputError, match=r"teacher\.precision lets the networks compute in fp32; use data\.dtype"
    ):
        losses_of(
            teacher={"precision": "fp32"}, data={"dtype": "bf16"}, train={"precision": "bf16", "epochs": 1}
        )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["none", "kd", "simkd", "kdav"])
def test_compiled_networks(losses_of, name):
    plain = losses_of(name)
    torch._dynamo.reset()
    counters.clear()
    compiled = losses_of(name, model={"name": "cifar:resnet8", "width": 0.25, "compile": True})
    assert counters["stats"]["unique_graphs"] > 0
    assert_same_training(compiled, plain)
    if name == "kdav":
        counters.clear()
        torch._dynamo.reset()
        assert_same_training(losses_of(name, teacher={"compile": True}), plain)
        assert counters["stats"]["unique_graphs"] > 0


def test_the_parts_of_a_step_are_entered_in_order(small_config, teacher_run, tmp_path):
    entered = []

    @contextmanager
    def clock(name):
        entered.append(name)
        yield

    teacher = {"name": "cifar:resnet8", "checkpoint": str(teacher_run)}
    train = {"accumulate": 2, "epochs": 1}
    run = set_up(
        small_config(tmp_path / "run", distiller={"name": "kd"}, teacher=teacher, train=train),
        start_cluster("cpu"),
    )
    run.start_engine()
    take_step(run, iter(run.loaders.train), 0, clock)
    # What the loss begins before the student answers is the loss's.
    micro = ["data", "teacher", "loss", "student", "loss", "backward"]
    assert entered == [*micro, *micro, "optimizer"]
    assert set(entered) == set(PARTS)
