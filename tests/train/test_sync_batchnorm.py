"""Synchronised BatchNorm on two and three gloo ranks against plain BatchNorm of the whole batch in float64."""

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from kdav_fast import EmbeddingHead
from kdav_fast.errors import InputError
from kdav_fast.models import build_classifier
from kdav_fast.student.student import Student
from kdav_fast.train.sync_batchnorm import synchronize_batchnorm
from tests.train import processes

ROWS = {2: (7, 1), 3: (5, 0, 3)}
"""Of each rank, by number of ranks: uneven, a single one, none."""
BATCH, STEPS, WIDTH = 8, 3, 4


@dataclass(frozen=True)
class Case:
    """A module and what it is fed."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (WIDTH, 3, 5)
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    mean: float = 0.5
    std: float = 2.0
    autocast: bool = False


def _network() -> nn.Module:
    """Several layers behind each other: the gradient of one is the input of the next one's communication."""
    return nn.Sequential(
        nn.Conv2d(WIDTH, 6, 3, padding=1, bias=False),
        BatchNormAct2d(6),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5 * 3 * 5, 7, bias=False),
        nn.BatchNorm1d(7),
    )


CASES = {
    "1d": Case(functools.partial(nn.BatchNorm1d, WIDTH), shape=(WIDTH,)),
    "1d over positions": Case(functools.partial(nn.BatchNorm1d, WIDTH), shape=(WIDTH, 6)),
    "2d": Case(functools.partial(nn.BatchNorm2d, WIDTH, eps=1e-2, momentum=0.3)),
    "3d": Case(functools.partial(nn.BatchNorm3d, WIDTH), shape=(WIDTH, 2, 3, 2)),
    "channels last": Case(functools.partial(nn.BatchNorm2d, WIDTH), layout=torch.channels_last),
    "cumulative": Case(functools.partial(nn.BatchNorm2d, WIDTH, momentum=None)),
    "untracked": Case(functools.partial(nn.BatchNorm2d, WIDTH, track_running_stats=False)),
    "not affine": Case(functools.partial(nn.BatchNorm2d, WIDTH, affine=False)),
    "float64": Case(functools.partial(nn.BatchNorm2d, WIDTH, dtype=torch.float64), dtype=torch.float64),
    "timm, ReLU in place": Case(functools.partial(BatchNormAct2d, WIDTH)),
    "timm, not affine": Case(functools.partial(BatchNormAct2d, WIDTH, affine=False)),
    "timm, SiLU": Case(functools.partial(BatchNormAct2d, WIDTH, act_layer=nn.SiLU)),
    "network": Case(_network),
    "head": Case(functools.partial(EmbeddingHead, 6, 5, 3), shape=(6,)),
    "large mean": Case(functools.partial(nn.BatchNorm2d, WIDTH), mean=1e3, std=1e-2),
    "constant": Case(functools.partial(nn.BatchNorm2d, WIDTH), mean=1e6, std=0.0),
    "bfloat16": Case(functools.partial(nn.BatchNorm2d, WIDTH), dtype=torch.bfloat16, autocast=True),
    "float16": Case(functools.partial(nn.BatchNorm2d, WIDTH), dtype=torch.float16, autocast=True),
}


def module_of(case: Case) -> nn.Module:
    """The case's plain module, with affine parameters that are not 1 and 0."""
    torch.manual_seed(1)
    module = case.build()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return module


def batch_of(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output of all ranks; each channel and each row differ from the others."""
    generator = torch.Generator().manual_seed(step)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x = normal(BATCH, *case.shape) + torch.linspace(-1, 1, BATCH).view(-1, *[1] * len(case.shape))
    with torch.no_grad():
        output = module_of(case).double()(x)
    x = (case.mean + case.std * x).to(case.dtype).contiguous(memory_format=case.layout)
    return x, normal(output.shape).to(case.dtype)


def train(
    case: Case,
    module: nn.Module,
    part: slice = slice(None),
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """A few steps on some rows of the batch: every step's output and gradients, and the state at the end."""
    result: dict[str, Any] = {"output": [], "input": []}
    for step in range(STEPS):
        x, grad = (tensor[part].to(device, dtype or case.dtype) for tensor in batch_of(case, step))
        x = x.clone().requires_grad_()
        with torch.autocast(device, case.dtype, enabled=case.autocast and dtype is None):
            output = module(x)
        output.backward(grad)
        result["output"].append(output.detach())
        result["input"].append(x.grad)
    result["parameters"] = {name: parameter.grad for name, parameter in module.named_parameters()}
    result["buffers"] = dict(module.named_buffers())
    return result


def main(folder: Path) -> None:
    """What one rank does for all the tests: starting once for each would take longer than the tests."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # waiting for nobody fails soon
    rank, world = dist.get_rank(), dist.get_world_size()
    start = sum(ROWS[world][:rank])
    part = slice(start, start + ROWS[world][rank])
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        module = synchronize_batchnorm(module_of(case))
        results[name] = train(case, module, part)
        if rank == 0:  # alone: no rank answers
            x, _ = batch_of(case, STEPS)
            with torch.no_grad():
                results[name]["evaluated"] = module.eval()(x)
    lone = synchronize_batchnorm(nn.BatchNorm1d(WIDTH))
    try:
        lone(torch.ones(int(rank == 0), WIDTH))
    except ValueError as error:
        results["lone row"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What every rank computed for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.run([__file__, str(folder)], request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@functools.cache
def truth(name: str) -> dict[str, Any]:
    """Plain BatchNorm of the whole batch in float64."""
    return train(CASES[name], module_of(CASES[name]).double(), dtype=torch.float64)


def whole(ranks: list[dict[str, Any]], name: str, what: str) -> list[Tensor]:
    """The rows of all ranks, step by step."""
    return [torch.cat(parts) for parts in zip(*(rank[name][what] for rank in ranks), strict=True)]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error in a tensor, in units of its largest expected value."""
    errors = [
        (a.double() - e).abs().max() / e.abs().max().clamp(min=torch.finfo(e.dtype).tiny)
        for a, e in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())  # Python's max would pass over nan


def roundings(count: int, dtype: torch.dtype) -> float:
    return count * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("what", ["output", "input"])
def test_outputs_and_input_gradients_are_those_of_the_whole_batch(ranks, name, what):
    actual, expected = whole(ranks, name, what), truth(name)[what]
    assert {tensor.dtype for tensor in actual} == {CASES[name].dtype}
    assert worst(actual, expected) < roundings(8, CASES[name].dtype)


@pytest.mark.parametrize("name", CASES)
def test_parameter_gradients_add_up_to_those_of_the_whole_batch(ranks, name):
    expected = truth(name)["parameters"]
    assert all(rank[name]["parameters"].keys() == expected.keys() for rank in ranks)
    for parameter, gradient in expected.items():
        total = sum(rank[name]["parameters"][parameter] for rank in ranks)
        assert worst([total], [gradient]) < roundings(16, total.dtype), parameter


@pytest.mark.parametrize("name", CASES)
def test_running_statistics_are_those_of_the_whole_batch_on_every_rank(ranks, name):
    expected = truth(name)["buffers"]
    assert all(rank[name]["buffers"].keys() == expected.keys() for rank in ranks)
    for buffer, value in expected.items():
        first, *others = (rank[name]["buffers"][buffer] for rank in ranks)
        assert all(torch.equal(first, other) for other in others), buffer
        if buffer.endswith("num_batches_tracked"):
            assert first == STEPS
        else:
            assert worst([first], [value]) < roundings(8, first.dtype), buffer


def test_far_from_zero_torch_is_not_more_exact(ranks):
    plain = train(CASES["large mean"], module_of(CASES["large mean"]))
    for what in ("output", "input"):
        expected = truth("large mean")[what]
        assert worst(whole(ranks, "large mean", what), expected) <= worst(plain[what], expected)


def test_channels_last_stays(ranks):
    for what in ("output", "input"):
        for tensor in ranks[0]["channels last"][what]:
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_plain_and_needs_no_other_rank(ranks, name):
    plain = module_of(CASES[name])
    plain.load_state_dict(ranks[0][name]["buffers"], strict=False)
    with torch.no_grad():
        expected = plain.eval()(batch_of(CASES[name], STEPS)[0])
    assert torch.equal(ranks[0][name]["evaluated"], expected)


def test_a_batch_of_one_row_is_refused_on_every_rank(ranks):
    assert all("more than 1 value a channel" in rank["lone row"] for rank in ranks)


def test_a_head_trained_on_several_ranks_folds(ranks):
    head = synchronize_batchnorm(module_of(CASES["head"]))
    head.load_state_dict(ranks[0]["head"]["buffers"], strict=False)
    head.observe(torch.randn(20, 5), torch.arange(20) % 3)
    features, _ = batch_of(CASES["head"], STEPS)
    head.eval()
    torch.testing.assert_close(head.fold()(features), head.classify(head(features)))


@contextlib.contextmanager
def group_of_one(backend: str) -> Iterator[None]:
    if dist.is_initialized():  # by another test's run in this process
        yield
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_alone_it_is_plain_batchnorm(name, grouped):
    expected = train(CASES[name], module_of(CASES[name]))
    with group_of_one("gloo") if grouped else contextlib.nullcontext():
        actual = train(CASES[name], synchronize_batchnorm(module_of(CASES[name])))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_alone_on_a_gpu_it_is_plain_batchnorm(name):
    expected = train(CASES[name], module_of(CASES[name]).cuda(), device="cuda")
    with group_of_one("nccl"):
        actual = train(CASES[name], synchronize_batchnorm(module_of(CASES[name])).cuda(), device="cuda")
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(WIDTH), BatchNormAct2d(WIDTH)])
def test_elsewhere_than_on_a_cpu_torch_synchronises(layer, monkeypatch):
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: x - 1)
    output = synchronize_batchnorm(layer)(torch.zeros(2, WIDTH, 1, 1, device="meta"))
    assert output.device.type == "meta"


def test_a_student_keeps_its_modules_and_its_state():
    network = build_classifier("timm:mobilenetv3_small_050", 3)
    head = EmbeddingHead(network.feature_width, 5, 3)
    head.observe(torch.randn(6, 5), torch.arange(6) % 3)  # to be folded, it must have seen something
    student = Student(network, head)
    before = copy.deepcopy(student)
    objects = [
        dict(each()) for each in (student.named_modules, student.named_parameters, student.named_buffers)
    ]
    assert any(isinstance(module, BatchNormAct2d) for module in student.modules())

    assert synchronize_batchnorm(student) is student
    assert synchronize_batchnorm(student) is student  # a second time changes nothing
    layers = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert head.norm in layers
    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in layers)

    for each, known in zip(
        (student.named_modules, student.named_parameters, student.named_buffers), objects, strict=True
    ):
        now = dict(each())
        assert list(now) == list(known)
        assert all(now[path] is known[path] for path in known)
    assert list(student.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(student.state_dict(), before.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(student).weights(), before.weights(), rtol=0, atol=0)


def test_a_batchnorm_itself_is_returned():
    norm = nn.BatchNorm1d(WIDTH)
    assert synchronize_batchnorm(norm) is norm
    assert isinstance(norm, nn.SyncBatchNorm)


def test_an_unknown_subclass_is_refused_before_anything_changes():
    class Other(nn.BatchNorm2d):
        pass

    module = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Sequential(Other(WIDTH)))
    with pytest.raises(InputError, match="1.0 is a Other, whose statistics"):
        synchronize_batchnorm(module)
    assert type(module[0]) is nn.BatchNorm2d


if __name__ == "__main__":
    main(Path(sys.argv[1]))
