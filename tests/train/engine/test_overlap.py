"""At stage 0, two processes add up gradients during the backward pass, and come to what one comes to in plain torch."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from kdav_fast.config import OptimizerConfig, TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Learned, Losses
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.student.trainee import Trainee
from kdav_fast.train.engine.engine import start_engine
from kdav_fast.train.optimizer import build_optimizer
from tests.train import processes

WIDTH, ROWS, STEPS, ACCUMULATE = 1200, 8, 3, 2
"""The gradients of a layer fill more than half a bucket."""
DECAY = {"momentum": 0.9, "weight_decay": 0.1}


class Network(nn.Module):
    """Some of it is frozen, some of it is reached by no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.frozen, self.spare = nn.Linear(WIDTH, 3), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> Outputs:
        features = self.layers(images)
        return Outputs(features, self.frozen(features))


def build() -> tuple[Network, nn.Linear]:
    torch.manual_seed(0)
    return Network(), nn.Linear(WIDTH, 2)


def loss_of(features: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, projected: torch.Tensor):
    return F.cross_entropy(logits, labels) + projected.square().mean()


def loss(student, teacher, batch, learned, progress) -> Losses:
    projected = learned["projector"](student.features)
    return Losses(loss_of(student.features, student.logits, batch.labels, projected), {})


def images_of(micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(micro)
    images = torch.randn(ROWS, WIDTH, generator=generator)
    return images, torch.randint(3, (ROWS,), generator=generator)


def train_on_this_rank(folder: Path) -> None:
    cluster = start_cluster("cpu")
    network, projector = build()
    trainee = Trainee(network, {"projector": projector}, loss, torch.device("cpu"), None)
    optimizer = build_optimizer(OptimizerConfig(**DECAY), trainee, {"projector": Learned(projector)})
    config = TrainConfig(batch_size=ACCUMULATE * ROWS, accumulate=ACCUMULATE)
    engine = start_engine(trainee, optimizer, config, cluster, None)
    mine = slice(cluster.rank, None, cluster.world)
    events = []
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            images, labels = images_of(ACCUMULATE * step + micro)
            valid = torch.ones(ROWS // 2, dtype=torch.bool)
            batch = Batch(images[mine], labels[mine], valid, torch.arange(ROWS // 2))
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                answer = engine(batch, None, None)
                engine.backward(answer.total, last=micro == ACCUMULATE - 1)
            events.append(
                [(event.name, event.time_range.start, event.time_range.end) for event in seen.events()]
            )
        assert engine.step(0.1 / (step + 1))
    torch.save({"weights": trainee.state_dict(), "events": events}, folder / f"{cluster.rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes.run([__file__, str(folder)], 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_weights_are_those_of_plain_torch(ranks):
    network, projector = build()
    modules = nn.ModuleDict({"student": network, "learned": nn.ModuleDict({"projector": projector})})
    plain = torch.optim.SGD([p for p in modules.parameters() if p.requires_grad], lr=1.0, **DECAY)
    for step in range(STEPS):
        plain.param_groups[0]["lr"] = 0.1 / (step + 1)
        plain.zero_grad()
        for micro in range(ACCUMULATE):
            images, labels = images_of(ACCUMULATE * step + micro)
            answer = network(images)
            one = loss_of(answer.features, answer.logits, labels, projector(answer.features))
            (one / ACCUMULATE).backward()
        plain.step()
    for name, expected in modules.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_sent_once_a_step_while_the_backward_pass_goes_on(ranks):
    for number, events in enumerate(ranks[0]["events"]):
        sent = [start for name, start, _ in events if name == "gloo:all_reduce"]
        computed = [end for name, _, end in events if name == "AddmmBackward0"]
        if number % ACCUMULATE < ACCUMULATE - 1:
            assert not sent
        else:
            assert min(sent) < max(computed)


if __name__ == "__main__":
    train_on_this_rank(Path(sys.argv[1]))
