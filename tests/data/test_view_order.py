"""Which fixed view is shown when."""

import numpy as np
import pytest

from kdav_fast.data.order import EpochOrder
from kdav_fast.data.view_order import ViewOrder
from kdav_fast.data.views import ClassPairs, Views

IMAGES = np.arange(40)


def shown(order: ViewOrder, loaded: int, epochs: int) -> np.ndarray:
    """Epochs x loaded x images."""
    rows = np.tile(IMAGES, loaded)
    return np.stack([order.shown(epoch, rows).reshape(loaded, -1) for epoch in range(epochs)])


@pytest.mark.parametrize(
    ("count", "loaded"), [(1, 1), (2, 1), (10, 1), (4, 2), (3, 2), (5, 3), (3, 3), (2, 3)]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_none_is_shown_twice_before_all_were(count, loaded, shuffle):
    views = shown(ViewOrder(count, loaded, shuffle=shuffle, seed=1), loaded, 3 * count)
    for rounds in views.reshape(-1, count, len(IMAGES)):
        assert (np.sort(rounds, axis=0) == np.arange(count)[:, None]).all()
    # Within an epoch as many different ones as there are.
    different = (np.diff(np.sort(views, axis=1), axis=1) != 0).sum(1) + 1
    assert (different == min(count, loaded)).all()


def test_each_image_and_each_round_has_an_order_of_its_own():
    views = shown(ViewOrder(6, 1, shuffle=True, seed=1), 1, 12)[:, 0]
    first, second = (set(map(tuple, part.T)) for part in (views[:6], views[6:]))
    assert len(first) > 35
    assert len(second) > 35
    assert (views[:6] != views[6:]).any(0).sum() > 35
    other = shown(ViewOrder(6, 1, shuffle=True, seed=2), 1, 12)[:, 0]
    assert (views != other).mean() > 0.7


def test_every_view_comes_first_equally_often():
    first = ViewOrder(5, 1, shuffle=True, seed=3).shown(0, np.arange(5000))
    # Five standard deviations of a count.
    assert abs(np.bincount(first, minlength=5) - 1000).max() < 5 * np.sqrt(1000 * 0.8)


def test_without_shuffling_views_follow_one_another():
    assert shown(ViewOrder(3, 1, shuffle=False, seed=1), 1, 4)[:, 0, 0].tolist() == [0, 1, 2, 0]
    assert shown(ViewOrder(3, 3, shuffle=False, seed=1), 3, 1)[0, :, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("order", [Views(2), ClassPairs()])
def test_ranks_and_batches_of_any_size_show_an_image_in_the_same_view(order):
    """And what is read ahead is what is shown."""

    def pairs(epochs: EpochOrder) -> set[tuple]:
        found = set()
        for images, (ahead, views) in zip(
            epochs.images_to_load(1), epochs.upcoming_views(1, 0), strict=False
        ):
            assert (images == ahead).all()
            assert (epochs.views_to_show(1, images) == views).all()
            slots = np.repeat(range(2), epochs.batch_size)
            found |= set(zip(slots.tolist(), images.tolist(), views.tolist(), strict=True))
        return found

    options = {"shuffle": True, "order": order, "seed": 4, "views": 5}
    labels = np.arange(12) % 3
    alone = pairs(EpochOrder(labels, 6, **options))
    shared = [pairs(EpochOrder(labels, 2, rank=rank, world=3, **options)) for rank in range(3)]
    assert set.union(*shared) == alone
