"""A training step never waits for the device: not for what was found, nor for what it is told."""

from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdav_fast.config.method import method_names
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.tracking.meter import TrainMeter
from kdav_fast.train.phases import PhasePosition, run_phases
from kdav_fast.train.setup import set_up
from kdav_fast.train.step import take_step
from tests.train.host_reads import HostReads

KDAV_CASES = ({}, {"posterior": "ids"}, {"prototypes": "running", "weight_label": 0.5})
ONE = torch.tensor(1.0)
METHODS = [(name, {}) for name in method_names() if name != "kdav"] + [("kdav", keys) for keys in KDAV_CASES]


@pytest.fixture
def prepared(small_config, teacher_run, tmp_path):
    """A run of a method, its first step taken, with everything on that may cost one; and a batch without end."""

    def prepare(method, device="cpu", precision="fp32", **train):
        name, keys = method
        config = small_config(
            tmp_path / "run",
            device=device,
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            distiller={"name": name, **keys},
            train={"precision": precision, "ema_decay": 0.9, "clip_grad_norm": 1.0, "accumulate": 2, **train},
        )
        run = set_up(config, start_cluster(device))
        assert run_phases(run, PhasePosition(), lambda *_: False)
        run.start_engine()
        run.trainee.train()
        batches = repeat(next(iter(run.loaders.train)))
        take_step(run, batches, 0)  # looks at the teacher's first answers
        return run, batches

    return prepare


def go_on(run, batches, steps, meter):
    """Steps as the loop takes them."""
    for step in range(1, 1 + steps):
        taken, seen = take_step(run, batches, step)
        for micro in seen:
            meter.update(micro.answer.logits, micro.batch, micro.answer.total, micro.answer.parts, taken)
    return taken


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_is_read_in_a_step(prepared, method, precision):
    run, batches = prepared(method, precision=precision)
    meter = TrainMeter(run.cluster)
    with HostReads() as reads:
        go_on(run, batches, 2, meter)
    assert reads.found == []
    # fp16 begins with so large a scale that the first steps of some methods are skipped.
    assert precision == "fp16" or meter.read()["train/loss"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nothing_waits_for_the_gpu(prepared, method, precision):
    run, batches = prepared(method, "cuda", precision)
    meter = TrainMeter(run.cluster)
    go_on(run, batches, 2, meter)  # what is compiled or chosen at first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = go_on(run, batches, 3, meter)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert precision == "fp16" or taken
    assert meter.read()["images_per_second"] > 0


@pytest.mark.parametrize(
    "action",
    [
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        bool,
        int,
        float,
        Tensor.nonzero,
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu"),
        lambda x: x[x > 0],
        lambda x: x.expand(2).clone().__setitem__(0, 1.0),
        lambda x: x.expand(2).clone().__setitem__(x.expand(2) > 0, 1.0),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.tensor(1.0, device=x.device),
        lambda x: F.one_hot(x.expand(3).long()),  # in torch itself
        lambda x: torch.linalg.matrix_norm(x.expand(2, 2), ord=2),
    ],
)
def test_every_read_is_noticed(action):
    with HostReads() as reads:
        action(ONE)
    assert reads.found


def test_what_stays_on_the_device_is_no_read():
    with HostReads() as reads:
        x = ONE.expand(4).clone()
        x[1:] = 0
        x[torch.arange(2)] = -ONE
        x.copy_(torch.where(x > 0, x, -x))
        x.to(torch.float64).sum().clamp_(min=1)
    assert reads.found == []
