"""Two processes come to what one comes to on all their images: every method there is, in one pair of processes."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distillers.small_run import BATCH, SmallRun, all_cases
from tests.train import processes

WORLD = 2
PADDING = [((), (1, 2, 6)), ((0, 1, 2, 3, 7), (5,)), (range(BATCH), ()), ((4,), (0, 2))]
"""Rows of each of four batches, of both ranks: as uneven as it can be."""


CASES = all_cases()


def go_through(section, rank=None):
    """The phases and some steps on all images or on a rank's share of them: what each comes to, and the last state."""
    run = SmallRun(section)

    def sample(seed, padding, measuring=False):
        joined = [*padding[0], *(BATCH + row for row in padding[1])]
        whole = run.sample(seed, WORLD * BATCH, joined, measuring)
        return whole if rank is None else whole.taken(torch.arange(BATCH) + rank * BATCH)

    run.go_through_phases(
        [sample(seed, padding, measuring=True) for seed, padding in enumerate(PADDING)],
        [sample(seed, padding) for seed, padding in enumerate(PADDING)],
    )
    steps = []
    for step, padding in enumerate(PADDING):
        answer, gradients = run.answer(sample(10 + step, padding), step)
        counts = BATCH * (1 if rank is not None else WORLD) - sum(
            map(len, padding if rank is None else [padding[rank]])
        )
        values = {"total": answer.total.detach(), **answer.parts}
        steps.append(
            {"count": counts, "values": values, "gradients": gradients, "views": run.distiller.order.count}
        )
    return {"steps": steps, "state": run.distiller.state_dict()}


def go_through_on_this_rank(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save({case: go_through(section, rank) for case, section in CASES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes.run([__file__, str(folder)], WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, ranks):
    mine = [rank[case] for rank in ranks]
    alone = go_through(CASES[case])
    assert mine[0]["state"].keys() == alone["state"].keys()
    for name, expected in alone["state"].items():
        assert torch.equal(mine[0]["state"][name], mine[1]["state"][name]), name
        torch.testing.assert_close(
            mine[0]["state"][name],
            expected,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    for *shared, whole in zip(*(each["steps"] for each in mine), alone["steps"], strict=True):
        counts = [step["count"] for step in shared]
        assert sum(counts) == whole["count"]
        for name, expected in whole["values"].items():
            mean = sum(
                count * step["values"][name] for count, step in zip(counts, shared, strict=True)
            ) / sum(counts)
            torch.testing.assert_close(
                mean, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        for name, expected in whole["gradients"].items():
            parts = [step["gradients"][name] for step in shared]
            if parts[0].shape == expected.shape:  # of a parameter
                found = sum(parts)
            else:
                found = torch.cat([part.unflatten(0, (whole["views"], -1)) for part in parts], dim=1).flatten(
                    0, 1
                )
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


if __name__ == "__main__":
    go_through_on_this_rank(Path(sys.argv[1]))
