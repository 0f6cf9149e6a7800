"""Images of other classes: how many, which, and how often each counts."""

import numpy as np
import pytest
import torch

from kdav_fast.distillers.memories.negatives import OtherClasses
from tests.distillers.small_run import SmallRun, all_cases

LABELS = np.array([0, 0, 0, 1, 2, 2, 1, 0, 3, 3])


@pytest.mark.parametrize("count", [1, 4, 6])
def test_each_image_gets_as_many_of_other_classes_none_twice(count):
    index, weight = OtherClasses(LABELS, count, seed=0).draw(torch.tensor([0, 1, 3]), step=5)
    assert len(index.unique()) == len(index) <= count + 4
    for label, row in zip((0, 1, 3), weight, strict=True):
        assert row.sum() == count
        assert sorted(row.unique().tolist()) in ([1.0], [0.0, 1.0])
        assert (LABELS[index[row > 0]] != label).all()


def test_of_fewer_images_all_count_more_often():
    index, weight = OtherClasses(LABELS, 24, seed=0).draw(torch.tensor([0]), step=0)
    assert len(index) == 10
    assert torch.equal(weight, 4.0 * (torch.from_numpy(LABELS)[index] != 0)[None])


def test_every_step_draws_anew_and_the_same_after_a_restart():
    draws = [OtherClasses(LABELS, 2, seed=0).draw(torch.tensor([0]), step)[0] for step in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_another_seed_draws_others():
    seeds = (0, 1, 2**31 - 1)
    draws = [OtherClasses(LABELS, 2, seed).draw(torch.tensor([0]), step=1)[0].tolist() for seed in seeds]
    assert len(set(map(tuple, draws))) == 3
    # Not the same ones a few steps later.
    later = [OtherClasses(LABELS, 2, 0).draw(torch.tensor([0]), step)[0].tolist() for step in range(2, 5)]
    assert draws[1] not in later


@pytest.mark.parametrize("method", ["crd", "wcord", "diffkd"])
def test_methods_that_draw_do_so_by_the_run_s_seed(method):
    section = all_cases()[f"{method}-defaults"]
    section = section.model_copy(update={"negatives": 3} if method != "diffkd" else {})
    runs = [SmallRun(section, facts={"seed": seed}) for seed in (0, 0, 1)]
    losses = [[run.answer(run.sample(step), step)[0].total.item() for step in range(3)][-1] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_all_images_of_other_classes_are_as_likely():
    others = OtherClasses(LABELS, 3, seed=0)
    times = torch.zeros(10)
    for step in range(400):
        index, weight = others.draw(torch.tensor([2]), step)
        times[index] += weight[0]
    assert not times[[4, 5]].any()
    # 150 each; five standard deviations.
    torch.testing.assert_close(times[times > 0], torch.full((8,), 150.0), rtol=0, atol=5 * 9.7)


def test_without_other_classes_nothing_counts():
    _, weight = OtherClasses(np.zeros(5, int), 3, seed=0).draw(torch.tensor([0, 0]), 0)
    assert not weight.any()
