"""A copy that follows a module slowly, and a queue of embeddings."""

import pytest
import torch
from torch import nn

from kdav_fast.distillers.memories.queue import Queue
from kdav_fast.distillers.memories.slow_copy import follow, slow_copy


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def test_it_answers_as_the_module_and_trains_nothing():
    module, images = network(), torch.randn(5, 3, 6, 6)
    expected = module(images)
    copied = slow_copy(module)
    assert not list(copied.parameters())
    torch.testing.assert_close(copied(images), expected)
    assert copied.state_dict().keys() == module.state_dict().keys() - {"1.running_mean", "1.running_var"}


def test_it_follows_and_stands_still_where_the_module_does():
    module = network()
    module(torch.randn(5, 3, 6, 6))
    copied = slow_copy(module)
    before = {name: tensor.clone() for name, tensor in copied.state_dict().items()}
    follow(copied, module, 0.9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    with torch.no_grad():
        module[0].weight.add_(1)
    follow(copied, module, 0.75)
    torch.testing.assert_close(copied[0].weight, before["0.weight"] + 0.25)


def test_its_state_makes_a_round_trip():
    module = network()
    module(torch.randn(5, 3, 6, 6))
    used, restored = slow_copy(module), slow_copy(module)
    used[0].weight.zero_()
    restored.load_state_dict(dict(used.state_dict()))
    assert not restored[0].weight.any()


@pytest.mark.parametrize("sizes", [(2, 2, 3), (4, 1), (5,), (7,), (1, 7)])
def test_a_queue_holds_the_last_rows(sizes):
    queue, pushed = Queue(4, 2), []
    first = queue.rows
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4))
    for size in sizes:
        rows = torch.arange(2 * size).view(size, 2) + 10.0 * len(pushed)
        valid = torch.arange(size) != 1
        queue.push(rows.masked_fill(~valid[:, None], torch.nan), valid)
        pushed += rows[valid].tolist()
    ring = first.tolist()
    for number, row in enumerate(pushed):
        ring[number % 4] = row
    assert queue.rows.tolist() == ring
    assert queue.pointer == len(pushed) % 4
