"""The ring of teacher features against a plain list."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdav_fast import KDAVLoss, TeacherMemory, kdav_loss
from kdav_fast.errors import InputError
from tests.train import processes


def batch_of(rows, width=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.randn(rows, classes, generator=generator)


@settings(deadline=None, max_examples=80)
@given(
    length=st.integers(1, 9),
    pushes=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 2**25 - 1)), min_size=1, max_size=6),
    posterior=st.sampled_from(["dense", "ids"]),
)
def test_holds_what_a_list_of_the_last_rows_would(length, pushes, posterior):
    memory = TeacherMemory(length, 4, 3, posterior)
    kept = []
    for number, (rows, mask) in enumerate(pushes):
        embedding, logits = batch_of(rows, seed=number)
        valid = torch.tensor([bool(mask >> i & 1) for i in range(rows)], dtype=torch.bool)
        memory.push(embedding, logits, valid)
        kept += [(F.normalize(e, dim=0), g) for e, g, v in zip(embedding, logits, valid, strict=True) if v]
    assert memory.filled == min(len(kept), length)
    assert memory.cursor == len(kept) % length
    for place in range(len(kept))[-length:]:
        slot = place % length
        torch.testing.assert_close(memory.embedding[slot], kept[place][0])
        knowledge = kept[place][1]
        expected = knowledge.argmax() if posterior == "ids" else knowledge.softmax(0)
        torch.testing.assert_close(memory.posterior[slot], expected)


def test_labels_as_ids_and_temperature_of_dense_rows():
    embedding, logits = batch_of(2)
    ids = TeacherMemory(4, 4, 3, "ids")
    ids.push(embedding, torch.tensor([2, 0]))
    assert ids.posterior.tolist() == [2, 0, 0, 0]
    dense = TeacherMemory(4, 4, 3, temperature=4.0)
    dense.push(embedding, logits)
    torch.testing.assert_close(dense.posterior[:2], torch.softmax(logits / 4, 1))


def test_rows_that_are_not_finite_are_not_remembered():
    memory = TeacherMemory(4, 4, 3)
    embedding, logits = batch_of(4)
    embedding[1, 0] = torch.nan
    logits[2, 1] = torch.inf
    memory.push(embedding, logits)
    assert memory.filled == 2
    torch.testing.assert_close(memory.embedding[:2], F.normalize(embedding[[0, 3]], dim=1))
    assert memory.embedding.isfinite().all()


def test_state_restores_exactly():
    memory = TeacherMemory(5, 4, 3)
    memory.push(*batch_of(7))
    other = TeacherMemory(5, 4, 3)
    other.load_state_dict(memory.state_dict())
    for number in range(3):
        memory.push(*batch_of(3, seed=number))
        other.push(*batch_of(3, seed=number))
    assert all(torch.equal(a, b) for a, b in zip(memory.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize(
    ("embedding", "knowledge", "valid", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 3), None, "needed: B x 4"),
        (torch.zeros(2, 4), torch.zeros(2, 2), None, "needed: 2 x 3 logits"),
        (torch.zeros(2, 4), torch.zeros(3, 3), None, "needed: 2 x 3 logits"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), None, "int64 of shape"),
        (torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(2), "needed: 2 booleans"),
    ],
)
def test_unusable_batches_are_named(embedding, knowledge, valid, message):
    with pytest.raises(InputError, match=message):
        TeacherMemory(4, 4, 3).push(embedding, knowledge, valid)


def test_unusable_sizes_are_named():
    with pytest.raises(InputError, match="length is 0"):
        TeacherMemory(0, 4, 3)
    with pytest.raises(InputError, match="posterior is 'soft'; allowed: 'dense', 'ids'"):
        TeacherMemory(4, 4, 3, "soft")
    with pytest.raises(InputError, match=r"width is 4\.5; it must be a whole number"):
        TeacherMemory(4, 4.5, 3)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"temperature is {temperature}; it must be above 0"):
            TeacherMemory(4, 4, 3, temperature=temperature)


def push_on_one_rank(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    memory = TeacherMemory(8, 2, 2, "ids")
    for step in range(2):
        # Row r of rank k in step s is the direction of angle 100 s + 10 k + r degrees, of class k.
        angle = np.deg2rad([100 * step + 10 * rank + row for row in range(3)])
        rows = torch.tensor(np.stack([np.cos(angle), np.sin(angle)], 1), dtype=torch.float32)
        valid = torch.tensor([True, True, rank == 0])  # the last row of rank 1 is padding
        if step == 0:
            memory.push(rows, torch.full((3,), rank), valid)
            continue
        sent = memory.send(rows, torch.full((3,), rank), valid)
        assert memory.filled == 5  # nothing has changed yet
        dist.all_reduce(torch.ones(1))  # as of what comes between
        memory.receive(sent)
    found = memory.embedding, memory.posterior, memory.filled, memory.cursor
    torch.save([tensor.clone() for tensor in found], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_remember_both_batches_in_rank_order(tmp_path):
    processes.run([__file__, str(tmp_path)], 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(*tensors) for tensors in zip(*ranks, strict=True))
    embedding, posterior, filled, cursor = ranks[0]
    angle = torch.rad2deg(torch.atan2(embedding[:, 1], embedding[:, 0])).round().int().tolist()
    # Ten valid rows went into eight places: 0 1 2 10 11 | 100 101 102 110 111.
    assert angle == [110, 111, 2, 10, 11, 100, 101, 102]
    assert posterior.tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert filled == 8
    assert cursor == 2


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_class_id_that_is_none_is_refused(wrong):
    memory = TeacherMemory(4, 4, 3, "ids")
    embedding, _ = batch_of(2)
    with pytest.raises(
        InputError, match=f"a class id is {wrong}; needed: 0 to 2, as the memory has 3 classes"
    ):
        memory.push(embedding, torch.tensor([1, wrong]))
    assert memory.filled == 0
    memory.push(embedding, torch.tensor([1, wrong]), torch.tensor([True, False]))  # padding may hold anything
    assert memory.posterior.tolist() == [1, 0, 0, 0]


def test_the_loss_is_told_another_temperature_than_the_memory_s():
    memory = TeacherMemory(4, 4, 3, temperature=4.0)
    embedding, logits = batch_of(2)
    memory.push(embedding, logits)
    inputs = (embedding, embedding, logits, memory.embedding, memory.posterior, memory.filled)
    for loss in (kdav_loss, KDAVLoss()):
        with pytest.raises(
            ValueError, match=r"temperature is 1, but the memory's posteriors are softened by 4; give"
        ):
            loss(*inputs)
    assert kdav_loss(*inputs, temperature=4.0).loss.isfinite()
    ids = TeacherMemory(4, 4, 3, "ids", temperature=4.0)  # ids have none
    ids.push(embedding, logits)
    assert kdav_loss(*inputs[:4], ids.posterior, ids.filled).loss.isfinite()


if __name__ == "__main__":
    push_on_one_rank(Path(sys.argv[1]))
