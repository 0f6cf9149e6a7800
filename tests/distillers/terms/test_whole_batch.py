"""A term in which rows meet, on two ranks with padding in different places, against the same on one."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kdav_fast.distillers.terms.whole_batch import gather_batch
from tests.train import processes

ROWS = 4
VALID = torch.tensor([True, False, True, True, False, False, True, False])
"""Of both ranks: three and one."""


def inputs():
    generator = torch.Generator().manual_seed(0)
    answers, labels = torch.randn(2 * ROWS, 3, generator=generator).double(), torch.arange(2 * ROWS)
    answers[~VALID] = torch.nan
    return answers, labels


def similarity(valid, answers, labels):
    """Every row meets every other."""
    return ((answers @ answers.T).square() * labels[:, None]).sum() / valid.sum()


def share_on_one_rank(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    answers, labels = (tensor[mine] for tensor in inputs())
    answers.requires_grad_()
    loss = similarity(*gather_batch(VALID[mine], answers, labels))
    (loss * VALID[mine].sum() / VALID.sum()).backward()
    torch.save((loss.detach(), answers.grad), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_come_to_the_loss_and_the_gradient_of_one(tmp_path):
    processes.run([__file__, str(tmp_path)], 2)
    losses, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    answers, labels = inputs()
    answers, labels = answers[VALID].requires_grad_(), labels[VALID]
    alone = similarity(VALID[VALID], answers, labels)
    alone.backward()
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], alone.detach())
    gradient = torch.cat(gradients)
    torch.testing.assert_close(gradient[VALID], answers.grad)
    assert not gradient[~VALID].any()


def test_alone_only_padding_changes_and_is_zero():
    answers, labels = inputs()
    valid, kept, kept_labels = gather_batch(VALID, answers, labels)
    assert torch.equal(valid, VALID)
    assert torch.equal(kept[VALID], answers[VALID])
    assert not kept[~VALID].any()
    assert torch.equal(kept_labels, labels * VALID)


if __name__ == "__main__":
    share_on_one_rank(Path(sys.argv[1]))
