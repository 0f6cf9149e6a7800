"""A loss or gradient that is not finite skips the step, on all ranks alike, and leaves no trace."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kdav_fast.config import OptimizerConfig, TrainConfig, dump_config
from kdav_fast.data.batch import Batch
from kdav_fast.data.order import EpochOrder
from kdav_fast.distillers.base import Losses
from kdav_fast.errors import InputError
from kdav_fast.models import build_classifier
from kdav_fast.runtime.precision import LossScale
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.student.student import Student
from kdav_fast.student.trainee import Trainee
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train import loop, networks
from kdav_fast.train.engine.engine import start_engine
from kdav_fast.train.optimizer import build_optimizer
from kdav_fast.train.skipped_steps import SkippedSteps
from tests.train import processes

PROGRAM = str(processes.REPOSITORY / "tests/train/poisoned_run.py")
NAN, INF = float("nan"), float("inf")


def engine_of(network, zero_stage=0, dtype=None, accumulate=2, clip=0.0, **optimizer):
    options = OptimizerConfig(**{"momentum": 0.9, "weight_decay": 5e-4, **optimizer})
    config = TrainConfig(
        batch_size=8 * accumulate, accumulate=accumulate, zero_stage=zero_stage, clip_grad_norm=clip
    )
    cluster = start_cluster("cpu")
    trainee = Trainee(Student(network), {}, cross_entropy, cluster.device, dtype)
    return start_engine(trainee, build_optimizer(options, trainee), config, cluster, dtype)


def cross_entropy(student, teacher, batch, learned, progress):
    return Losses(F.cross_entropy(student.logits, batch.labels), {})


def loss_of(engine, images, labels):
    rows = torch.arange(len(labels))
    return engine(Batch(images, labels, rows >= 0, rows), None, None).total


def whole_state(engine):
    with engine.whole_weights():
        return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


def take(engine, images, labels, lr=0.05, factor=1.0):
    for micro, last in ((0, False), (1, True)):
        loss = loss_of(engine, images[micro], labels[micro])
        engine.backward(loss * (factor if last else 1.0), last=last)
    return engine.step(lr)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("poison", ["image", "loss", "infinite loss"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_skipped_step_is_as_if_it_had_not_been(zero_stage, poison, optimizer):
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    images, labels = torch.randn(3, 2, 8, 3, 16, 16), torch.randint(10, (3, 2, 8))
    with_it = engine_of(copy.deepcopy(network), zero_stage, name=optimizer)
    without = engine_of(network, zero_stage, name=optimizer)
    assert take(with_it, images[0], labels[0])
    spoilt = images[1].clone()
    if poison == "image":
        spoilt[1, 3, 2, 5, 5] = NAN
    before = whole_state(with_it)
    assert not take(with_it, spoilt, labels[1], factor={"loss": NAN, "infinite loss": INF}.get(poison, 1.0))
    after = whole_state(with_it)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert take(with_it, images[2], labels[2], lr=0.02)
    assert take(without, images[0], labels[0])
    assert take(without, images[2], labels[2], lr=0.02)
    expected = whole_state(without)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in whole_state(with_it).items())
    assert not all(torch.equal(tensor, after[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 1e-6])
def test_float16_s_small_gradients_are_those_of_float32(zero_stage, clip):
    """Of a loss so small that float16 gradients would vanish if they were not scaled."""
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    plain = copy.deepcopy(network)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    engine = engine_of(network, zero_stage, torch.float16, 1, clip, momentum=0.0, weight_decay=0.0)
    before = whole_state(engine)
    engine.backward(1e-6 * loss_of(engine, images, labels))
    assert engine.step(1e4)
    (1e-6 * F.cross_entropy(plain(images).logits, labels)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    factor = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0  # as torch and DeepSpeed clip
    after = whole_state(engine)
    names = [f"student.network.{name}" for name, _ in plain.named_parameters()]
    moved = torch.cat([(before[name] - after[name]).flatten() for name in names])
    expected = torch.cat([1e4 * factor * parameter.grad.flatten() for parameter in plain.parameters()])
    assert (moved - expected).norm() < 0.05 * expected.norm()  # float16's rounding; all would be off by 1


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_scale_of_float16_s_loss_falls_until_gradients_fit(zero_stage):
    torch.manual_seed(0)
    engine = engine_of(build_classifier("cifar:resnet8", 10, width=0.25), zero_stage, torch.float16)
    images, labels = torch.randn(2, 8, 3, 16, 16), torch.randint(10, (2, 8))
    before, taken = whole_state(engine), []
    while not any(taken):
        taken.append(take(engine, images, labels, factor=1e4))
    assert len(taken) > 1
    assert engine.loss_scale.value == 2.0 ** (16 - len(taken) + 1)
    assert not all(torch.equal(before[name], tensor) for name, tensor in whole_state(engine).items())


def test_loss_scale():
    taken, skipped = torch.tensor(True), torch.tensor(False)
    scale = LossScale(torch.float16)
    scale.update(skipped)
    assert scale.value == 2.0**15
    values = set()
    for _ in range(LossScale.GROWTH_INTERVAL):
        values.add(scale.value)
        scale.update(taken)
    assert values == {2.0**15}
    assert scale.value == 2.0**16
    for _ in range(8 * LossScale.GROWTH_INTERVAL + 1):
        scale.update(taken)
    assert scale.value == 2.0**24
    copied = LossScale(torch.float16)
    copied.load_state_dict(scale.state_dict())
    assert copied.state_dict() == scale.state_dict() == {"value": 2.0**24, "good_steps": 1}
    for _ in range(40):
        scale.update(skipped)
    assert scale.value == 1.0
    for dtype in (None, torch.bfloat16):
        scale = LossScale(dtype)
        scale.update(skipped)
        assert scale.value == 1.0


def test_so_many_in_a_row_stop_the_run():
    guard = SkippedSteps(3)
    for step in (1, 2):
        guard.skipped(step)
    guard.taken()
    for step in (4, 5):
        guard.skipped(step)
    with pytest.raises(InputError, match=r"not finite in 3 steps in a row, the last of them step 6; lower"):
        guard.skipped(6)


def test_what_is_said_of_skipped_steps_at_the_end():
    guard = SkippedSteps(20)
    assert guard.conclude(0, 10) is None
    assert guard.conclude(5, 10) is None
    assert guard.conclude(6, 10) == "warning: 6 of 10 steps were skipped, as loss or gradient was not finite"
    guard.skipped(10)
    assert guard.conclude(1, 10) is None  # what a scaled loss does now and then
    guard.skipped(11)
    assert "2 of 11 steps were skipped" in guard.conclude(2, 11)
    assert "the last 2 in a row among them" in guard.conclude(2, 11)
    with pytest.raises(
        InputError, match="not finite in any of the 11 steps, so nothing was trained and no student"
    ):
        guard.conclude(11, 11)


def test_a_run_that_took_no_step_is_no_success(small_config, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", train={"epochs": 0.25, "evaluate_every": 0, "save_every": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", lambda *_: (torch.tensor(False), []))
        with pytest.raises(InputError, match="not finite in any of the 2 steps"):
            loop.run_training(config)
    with pytest.raises(InputError, match="not finite in any of the 2 steps"):
        loop.run_training(config)  # its last checkpoint knows
    assert not (config.run_dir / "student.safetensors").exists()


@pytest.mark.parametrize("method", ["kd", "kdav", "simkd"])
def test_a_teacher_that_answers_nan_is_refused(small_config, teacher_run, tmp_path, monkeypatch, method):
    def build(*arguments):
        network, known = build_network(*arguments)
        if "teacher" in arguments:
            torch.nn.init.constant_(network.classifier.weight, INF)
        return network, known

    build_network = networks.build_network
    monkeypatch.setattr(networks, "build_network", build)
    teacher = {"name": "cifar:resnet8", "checkpoint": str(teacher_run)}
    distiller = {"name": method} | ({"weight_kl": 1.0} if method == "simkd" else {})
    config = small_config(tmp_path / "run", teacher=teacher, distiller=distiller)
    with pytest.raises(
        InputError, match=rf"the teacher's logits of (\d+) of the first \1 images are not.*{teacher_run}"
    ):
        loop.run_training(config)


def test_a_student_that_is_not_finite_is_not_written(small_config, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", train={"epochs": 0.25, "evaluate_every": 0})
    weights = Student.weights
    monkeypatch.setattr(Student, "weights", lambda self: {n: t * NAN for n, t in weights(self).items()})
    with pytest.raises(
        InputError, match=r"conv1\.weight of the trained student is not finite, so it is not written"
    ):
        loop.run_training(config)
    assert not (config.run_dir / "student.safetensors").exists()


@pytest.fixture(scope="module")
def launch(small_config, teacher_run, tmp_path_factory):
    """Two processes, of which the second is poisoned."""

    def run(what, steps, **train):
        config = small_config(
            tmp_path_factory.mktemp("poisoned") / "run",
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            distiller={"name": "kdav", "memory_length": 500, "center": False, "prototypes": "running"},
            train={"epochs": 2, "log_every": 1, **train},
        )
        file = config.run_dir.parent / "run.yaml"
        file.write_text(dump_config(config))
        group = processes.fork([PROGRAM, str(file), what, "1", str(steps)], world=2)
        texts = processes.outputs(group)
        return config.run_dir, [process.returncode for process in group], texts

    return run


@pytest.mark.parametrize(("what", "zero_stage"), [("images", 0), ("teacher", 2), ("loss", 3)])
def test_all_ranks_skip_alike(launch, what, zero_stage):
    run_dir, codes, texts = launch(what, [5, 6], zero_stage=zero_stage)
    assert codes == [0, 0], "\n".join(texts)
    assert texts[0].count("loss or gradient not finite, skipped") == 2
    lines = [line for line in read_metrics(run_dir) if "images_per_second" in line]
    assert [line.get("skipped_steps", 0) for line in lines] == [0] * 4 + [1] + [2] * 11
    assert ["train/loss" in line for line in lines] == [True] * 4 + [False] * 2 + [True] * 10
    checkpoint = run_dir / "checkpoints" / "step-00000016"
    for name in ("student", "distiller", "pieces-00000", "pieces-00001", "buffers-00000", "buffers-00001"):
        tensors = load_file(checkpoint / f"{name}.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values()), name
    # Every image of both epochs, but for those of the two steps.
    order = EpochOrder(np.zeros(240, np.int64), 32, shuffle=True, seed=0)
    seen = 2 * 240 - order.valid(order.places(0)[4:6]).sum()
    memory = load_file(checkpoint / "distiller.safetensors")
    observed = [
        load_file(checkpoint / f"buffers-{rank:05d}.safetensors")["student.head.class_mass"].sum()
        for rank in range(2)
    ]
    assert memory["memory.filled"] == sum(observed) == seen


def test_a_run_that_cannot_go_on_says_so(launch):
    run_dir, codes, texts = launch("loss", list(range(10, 17)), max_skipped_steps=3)
    assert codes == [2, 2]
    errors = [line for line in "".join(texts).splitlines() if "kdav: error" in line]
    assert len(errors) == 1
    assert "was not finite in 3 steps in a row, the last of them step 12; lower optimizer.lr" in errors[0]
    assert not (run_dir / "student.safetensors").exists()
    assert (run_dir / "checkpoints" / "step-00000008").is_dir()
