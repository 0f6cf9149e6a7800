"""The rows of every image against a dictionary."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdav_fast.distillers.memories.sample import SampleMemory
from kdav_fast.errors import InputError
from tests.train import processes

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def rows_of(count, width=3, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@st.composite
def updates(draw, images):
    """(index, values, valid): indices of padding may be anything, some rows are not finite."""
    count = draw(st.integers(0, 12))
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    index = torch.tensor(
        [draw(st.integers(0, images - 1) if v else st.integers(-9, 99)) for v in valid.tolist()]
    )
    values = rows_of(count, seed=draw(st.integers(0, 99)))
    for row in range(count):
        values[row, 1] = draw(st.sampled_from([1.0, 1.0, 1.0, torch.nan, -torch.inf, 1e39])) * values[row, 1]
    return index.long(), values, valid


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 9), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_holds_what_a_dictionary_would(images, dtype, host, data):
    memory, kept = SampleMemory(images, 3, dtype=dtype, host=host), {}
    for index, values, valid in data.draw(st.lists(updates(images), max_size=5)):
        memory.update(index, values, valid)
        for i, row, v in zip(index.tolist(), values.to(dtype), valid.tolist(), strict=True):
            if v and row.isfinite().all():
                kept[i] = row
    every = torch.arange(images)
    assert memory.seen(every).tolist() == [i in kept for i in range(images)]
    expected = torch.stack([kept.get(i, torch.zeros(3, dtype=dtype)) for i in range(images)])
    assert memory.rows(every).dtype == torch.float32
    assert torch.equal(memory.rows(every), expected.float())
    asked = torch.tensor(data.draw(st.lists(st.integers(0, images - 1))), dtype=torch.int64)
    assert torch.equal(memory.rows(asked), expected[asked].float())
    assert torch.equal(memory.seen(asked), memory.seen(every)[asked])


def test_of_many_rows_of_one_image_the_last_valid_one_counts():
    memory = SampleMemory(3, 2, dtype=torch.float32)
    values = torch.arange(20_000.0).view(-1, 2)
    valid = torch.arange(10_000) < 9_998
    memory.update(torch.ones(10_000, dtype=torch.int64), values, valid)
    assert memory.rows(torch.arange(3)).tolist() == [[0, 0], values[9_997].tolist(), [0, 0]]


def test_what_the_memory_s_dtype_cannot_hold_is_not_remembered():
    memory = SampleMemory(2, 1)
    memory.update(torch.tensor([0, 1]), torch.tensor([[65504.0], [70000.0]]))
    assert memory.seen(torch.tensor([0, 1])).tolist() == [True, False]
    assert memory.rows(torch.tensor([0, 1])).tolist() == [[65504], [0]]


def test_no_gradient_is_kept():
    memory = SampleMemory(2, 3)
    memory.update(torch.tensor([1]), rows_of(1).requires_grad_())
    assert not memory.rows(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_restores_exactly_and_apart_from_the_memory(dtype):
    memory, other = (SampleMemory(6, 3, dtype=dtype) for _ in range(2))
    memory.update(torch.tensor([4, 0]), rows_of(2))
    other.load_state_dict(memory.state_dict())
    for number in (1, 2):
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype
            for a, b in zip(memory.buffers(), other.buffers(), strict=True)
        )
        for one in (memory, other):
            one.update(torch.tensor([4, 5]), rows_of(2, seed=number))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_holds_what_it_says_from_the_beginning_to_the_end(dtype):
    memory = SampleMemory(1000, 7, dtype=dtype)
    held = [sum(buffer.untyped_storage().nbytes() for buffer in memory.buffers())]
    memory.update(torch.arange(1000), rows_of(1000, width=7))
    held.append(sum(buffer.untyped_storage().nbytes() for buffer in memory.buffers()))
    assert held == [1001 * (7 * dtype.itemsize + 1)] * 2
    assert memory.nbytes == held[0]


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize(
    "cast", [nn.Module.double, nn.Module.bfloat16, lambda module: module.to("cpu", torch.float64)]
)
def test_a_parent_s_dtype_is_not_the_memory_s(host, cast):
    parent = nn.ModuleDict({"memory": SampleMemory(4, 3, host=host), "layer": nn.Linear(2, 2)})
    memory = parent["memory"]
    memory.update(torch.tensor([2]), rows_of(1))
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    cast(parent)
    assert parent["layer"].weight.dtype in (torch.float64, torch.bfloat16)
    after = memory.state_dict()
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )


def test_a_memory_on_the_host_stays_there_and_any_other_goes_with_its_parent():
    parent = nn.ModuleList([SampleMemory(4, 3, host=True), SampleMemory(4, 3)])
    for memory in parent:
        memory.update(torch.tensor([2]), rows_of(1))
    parent.to("meta")
    assert {buffer.device.type for buffer in parent[0].buffers()} == {"cpu"}
    assert {buffer.device.type for buffer in parent[1].buffers()} == {"meta"}
    assert torch.equal(parent[0].rows(torch.tensor([2])), rows_of(1).half().float())
    parent.to_empty(device="cpu")
    assert torch.equal(parent[0].rows(torch.tensor([2])), rows_of(1).half().float())


GIB = 2**30


@pytest.fixture
def free_memory(monkeypatch):
    """Say how many bytes are free on the GPU and on the host."""

    def say(gpu, host):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (gpu, 80 * GIB))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=host))

    return say


def test_it_goes_to_the_host_where_it_would_take_half_of_the_gpu(free_memory):
    needed = 1001 * (64 * 2 + 1)
    free_memory(gpu=2 * needed - 2, host=GIB)
    memory = SampleMemory(1000, 64, device="cuda")
    assert memory.on_host
    assert {buffer.device.type for buffer in memory.buffers()} == {"cpu"}
    with pytest.raises(
        InputError, match=r"1000 x 64 values of torch.float16 need 0\.0 GiB, but half of the free GPU"
    ):
        SampleMemory(1000, 64, device="cuda", host=False)


def test_what_fits_nowhere_is_refused_before_it_is_allocated(free_memory, monkeypatch):
    free_memory(gpu=GIB, host=100 * GIB)
    with pytest.raises(
        InputError, match=r"need 18\d\d\.\d GiB, but 100\.0 GiB of memory a process are free; use fewer rows"
    ):
        SampleMemory(10**9, 1000, device="cuda")
    with pytest.raises(InputError, match="memory a process are free"):
        SampleMemory(10**9, 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match=r"but 12\.5 GiB of memory a process"):
        SampleMemory(10**8, 1000, host=True)


@pytest.mark.parametrize(
    ("index", "values", "valid", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), rows_of(2), None, "update: index is torch.int32 of shape"),
        (
            torch.zeros(2, 1, dtype=torch.int64),
            rows_of(2),
            None,
            r"of shape \(2, 1\); needed: B int64 numbers",
        ),
        (torch.tensor([0, 1]), rows_of(3), None, "needed: 2 x 3, floating"),
        (torch.tensor([0, 1]), rows_of(2, width=4), None, "needed: 2 x 3, floating"),
        (torch.tensor([0, 1]), rows_of(2).long(), None, "values is torch.int64 .* needed: 2 x 3, floating"),
        (torch.tensor([0, 1]), rows_of(2), torch.ones(2), "needed: 2 booleans"),
        (torch.tensor([0, 1]), rows_of(2), torch.ones(3, dtype=torch.bool), "needed: 2 booleans"),
        (torch.tensor([0, 5]), rows_of(2), None, "an index is 5; needed: 0 to 4, as the memory has 5 rows"),
        (torch.tensor([-1, 0]), rows_of(2), torch.tensor([True, False]), "an index is -1; needed: 0 to 4"),
    ],
)
def test_unusable_batches_are_named_and_change_nothing(index, values, valid, message):
    memory = SampleMemory(5, 3)
    with pytest.raises(InputError, match=message):
        memory.update(index, values, valid)
    assert not memory.seen(torch.arange(5)).any()


@pytest.mark.parametrize("ask", [SampleMemory.rows, SampleMemory.seen])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_image_that_there_is_not_cannot_be_asked_for(ask, wrong):
    memory = SampleMemory(5, 3)
    with pytest.raises(InputError, match=f"an index is {wrong}; needed: 0 to 4"):
        ask(memory, torch.tensor([0, wrong]))
    with pytest.raises(InputError, match="needed: B int64 numbers"):
        ask(memory, torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((0, 3), torch.float16, "rows is 0; it must be at least 1"),
        ((3, 2.5), torch.float16, r"width is 2\.5; it must be a whole number"),
        ((3, 3), torch.int64, "dtype is torch.int64; allowed: torch.float16, "),
    ],
)
def test_a_memory_that_there_cannot_be_is_refused(sizes, dtype, message):
    with pytest.raises(InputError, match=message):
        SampleMemory(*sizes, dtype=dtype)


def update_on_one_rank(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    memory = SampleMemory(8, 2)
    # Image 3 comes from both ranks, image 5 from rank 1 as padding, image 6 from rank 0 twice.
    index = torch.tensor([[3, 6, 6], [5, 3, 7]][rank])
    values = torch.tensor([[10 * rank + row, rank] for row in range(3)], dtype=torch.float32)
    memory.update(index, values, index != 5)
    # Then each row of its own, and image 3 from rank 0 alone.
    memory.update(torch.tensor([[0, 3], [1, 2]][rank]), values[:2] + 100)
    torch.save(memory.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_remember_both_batches_in_rank_order(tmp_path):
    processes.run([__file__, str(tmp_path)], 2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    memory = SampleMemory(8, 2)
    memory.load_state_dict(states[0])
    every = torch.arange(8)
    assert memory.seen(every).tolist() == [True, True, True, True, False, False, True, True]
    expected = np.zeros((8, 2))
    expected[6], expected[7] = (2, 0), (12, 1)
    expected[0], expected[3], expected[1], expected[2] = (100, 100), (101, 100), (110, 101), (111, 101)
    assert memory.rows(every).tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("host", [False, True])
def test_on_a_gpu_it_holds_the_same(host):
    here, there = SampleMemory(50, 3), SampleMemory(50, 3, device="cuda", host=host)
    assert {buffer.is_cuda for buffer in there.buffers()} == {not host}
    for number in range(4):
        index = torch.randint(50, (64,), generator=torch.Generator().manual_seed(number))
        values, valid = rows_of(64, seed=number), index % 7 != number
        here.update(index, values, valid)
        there.update(index.cuda(), values.cuda(), valid.cuda())
    every = torch.arange(50)
    assert there.rows(every.cuda()).is_cuda
    assert torch.equal(there.rows(every.cuda()).cpu(), here.rows(every))
    assert torch.equal(there.seen(every), here.seen(every))


if __name__ == "__main__":
    update_on_one_rank(Path(sys.argv[1]))
