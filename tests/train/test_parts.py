"""The small parts of training, each alone: precision, teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kdav_fast.config import OptimizerConfig, TrainConfig
from kdav_fast.models import IMAGENET, Normalization, build_classifier, renormalization
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.train.engine import StudentEngine
from kdav_fast.train.optimizer import build_optimizer
from kdav_fast.train.setup import set_up

CPU = torch.device("cpu")


def test_teacher_sees_its_own_normalisation_and_never_changes():
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    plain = copy.deepcopy(network).eval()
    half = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    teacher = FrozenTeacher(network, renormalization(IMAGENET, half), CPU, None)
    teacher.train()
    pixels = torch.rand(4, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    outputs = teacher((pixels - mean) / std)
    with torch.no_grad():
        expected = plain((pixels - 0.5) / 0.5)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.features, expected.features, rtol=1e-4, atol=1e-5)
    assert not outputs.logits.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_engine_step_is_plain_torch_s(zero_stage, clip):
    """Three steps of two micro-batches against the same steps written out in torch."""
    torch.manual_seed(0)
    mine = build_classifier("cifar:resnet8", 10, width=0.25)
    theirs = copy.deepcopy(mine)
    config = TrainConfig(batch_size=16, accumulate=2, zero_stage=zero_stage, clip_grad_norm=clip)
    optimizer = build_optimizer(OptimizerConfig(momentum=0.9, weight_decay=5e-4), mine)
    engine = StudentEngine(mine, optimizer, config, start_cluster("cpu"), None)
    plain = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(6, 8, 3, 16, 16), torch.randint(10, (6, 8))
    for step in range(3):
        lr = 0.05 / (step + 1)
        plain.param_groups[0]["lr"] = lr
        plain.zero_grad()
        for micro in (2 * step, 2 * step + 1):
            loss = F.cross_entropy(engine(images[micro]).logits, labels[micro])
            engine.backward(loss, last=micro % 2 == 1)
            (F.cross_entropy(theirs(images[micro]).logits, labels[micro]) / 2).backward()
        assert engine.step(lr)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        plain.step()
    with engine.whole_weights():
        for ours, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnn_tries_its_convolutions_unless_told_not_to(small_config, tmp_path, wanted):
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not wanted
    try:
        set_up(small_config(tmp_path / "run", train={"cudnn_benchmark": wanted}), start_cluster("cpu"))
        assert torch.backends.cudnn.benchmark is wanted
    finally:
        torch.backends.cudnn.benchmark = before
