"""What a step that is not taken leaves as it was."""

import pytest
import torch
from torch import nn

from kdav_fast import TeacherMemory
from kdav_fast.distillers.memories.sample import SampleMemory
from kdav_fast.train.engine.untouched import Untouched

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


class Method(nn.Module):
    """Buffers of several kinds and both memories, and one that two modules share."""

    def __init__(self):
        super().__init__()
        self.memory, self.rows = TeacherMemory(20, 3, 4), SampleMemory(30, 2)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.randn(3, 4, dtype=torch.float64).T)
        self.register_buffer("flags", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.part = nn.Module()
        self.part.register_buffer("count", self.count)


def change(method, generator, micro_batches, factor=1.0):
    """As a step does it."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    for _ in range(micro_batches):
        rows = normal(8, 3)
        method.memory.push(rows, normal(8, 4), normal(8) > -1)
        method.rows.update(torch.randint(30, (8,), generator=generator), normal(8, 2), normal(8) > -1)
        method.norm(factor * rows)
        method.table += factor * normal(4, 3)
        method.flags.logical_not_()
        method.count += 1


def state(method):
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_is_as_if_the_step_had_not_been(micro_batches):
    """Three micro-batches overwrite more rows than the ring has."""
    torch.manual_seed(0)
    method, generator = Method(), torch.Generator().manual_seed(1)
    untouched = Untouched([method])
    outcomes = [TAKEN, SKIPPED, SKIPPED, TAKEN, TAKEN, SKIPPED, TAKEN]
    for taken in outcomes:
        before = state(method)
        change(method, generator, micro_batches, 1.0 if taken else float("nan"))
        after = state(method)
        assert not same(before, after)
        untouched.settle(taken)
        assert same(state(method), after if taken else before)


def test_a_memory_alone_keeps_nothing():
    """Who pushes without ever settling would fill the machine."""
    memory = TeacherMemory(20, 3, 4)
    memory.push(torch.randn(8, 3), torch.randn(8, 4))
    before = state(memory)
    memory.settle(SKIPPED)
    assert same(before, state(memory))
