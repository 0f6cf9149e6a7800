"""The engine against plain torch: its steps, and what a step leaves behind that is not taken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdav_fast.config import OptimizerConfig, TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Learned, Losses
from kdav_fast.models import build_classifier
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.student.student import Student
from kdav_fast.student.trainee import Trainee
from kdav_fast.train.engine.engine import start_engine
from kdav_fast.train.optimizer import build_optimizer

CPU = torch.device("cpu")


def label_loss(student, teacher, batch, learned, progress):
    return Losses(F.cross_entropy(student.logits, batch.labels), {})


def batch_of(images, labels):
    return Batch(images, labels, torch.ones_like(labels, dtype=torch.bool), torch.arange(len(labels)))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_engine_step_is_plain_torch_s(zero_stage, clip):
    """Three steps of two micro-batches against the same steps written out in torch."""
    torch.manual_seed(0)
    mine = build_classifier("cifar:resnet8", 10, width=0.25)
    theirs = copy.deepcopy(mine)
    config = TrainConfig(batch_size=16, accumulate=2, zero_stage=zero_stage, clip_grad_norm=clip)
    trainee = Trainee(Student(mine), {}, label_loss, CPU, None)
    optimizer = build_optimizer(OptimizerConfig(momentum=0.9, weight_decay=5e-4), trainee)
    engine = start_engine(trainee, optimizer, config, start_cluster("cpu"), None)
    plain = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(6, 8, 3, 16, 16), torch.randint(10, (6, 8))
    for step in range(3):
        lr = 0.05 / (step + 1)
        plain.param_groups[0]["lr"] = lr
        plain.zero_grad()
        for micro in (2 * step, 2 * step + 1):
            answer = engine(batch_of(images[micro], labels[micro]), None, None)
            engine.backward(answer.total, last=micro % 2 == 1)
            (F.cross_entropy(theirs(images[micro]).logits, labels[micro]) / 2).backward()
        assert engine.step(lr)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        plain.step()
    with engine.whole_weights():
        for ours, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_that_is_not_taken_leaves_what_is_learned_as_it_was(zero_stage):
    """Weights, BatchNorm statistics and momentum: the step after it is that of a run that never met it."""
    images, labels = torch.randn(4, 8, 3, 16, 16), torch.randint(10, (4, 8))
    factors = torch.tensor([1.0, 1.0, float("inf"), 1.0])

    def loss(student, teacher, batch, learned, progress):
        looked_at = learned["projector"](student.features)
        return Losses(
            label_loss(student, teacher, batch, learned, progress).total + progress * looked_at.mean(), {}
        )

    def trained(steps):
        torch.manual_seed(0)
        network = build_classifier("cifar:resnet8", 10, width=0.25)
        projector = nn.Sequential(nn.Linear(network.feature_width, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        learned = {"projector": Learned(projector)}
        trainee = Trainee(Student(network), {"projector": projector}, loss, CPU, None)
        optimizer = build_optimizer(OptimizerConfig(), trainee, learned)
        config = TrainConfig(batch_size=8, zero_stage=zero_stage)
        engine = start_engine(trainee, optimizer, config, start_cluster("cpu"), None)
        states = []
        for step in steps:
            engine.backward(engine(batch_of(images[step], labels[step]), None, factors[step]).total)
            taken = engine.step(0.1)
            assert taken == factors[step].isfinite()
            with engine.whole_weights():
                states.append(copy.deepcopy(trainee.state_dict()))
        return states

    first, second, skipped, last = trained(range(4))
    assert not torch.equal(
        first["learned.projector.1.running_mean"], second["learned.projector.1.running_mean"]
    )
    torch.testing.assert_close(skipped, second, rtol=0, atol=0)
    torch.testing.assert_close(last, trained([0, 1, 3])[-1], rtol=0, atol=0)
