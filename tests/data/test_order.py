from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdav_fast.data.order import EpochOrder
from kdav_fast.data.views import ClassPairs, Rotations, Shuffled, Views

counts, worlds, batch_sizes = st.integers(1, 200), st.integers(1, 8), st.integers(1, 9)
several_views = st.sampled_from([Views(2), Views(3), Rotations(4), ClassPairs()])
orders = st.just(Shuffled()) | several_views


def order_of(images, batch_size, classes=5, **options):
    """`images` images; their classes follow one another."""
    return EpochOrder(np.arange(images) % classes, batch_size, **options)


def ranks(images, batch_size, world, **options):
    return [order_of(images, batch_size, rank=rank, world=world, **options) for rank in range(world)]


@given(counts, worlds, batch_sizes, st.booleans(), orders, st.integers(0, 3))
def test_every_image_once_and_equally_many_batches(images, world, batch_size, shuffle, order, epoch):
    shared = ranks(images, batch_size, world, shuffle=shuffle, order=order, seed=7)
    assert {one.batches for one in shared} == {-(-images // (batch_size * world))}
    places = [one.places(epoch) for one in shared]
    assert all(one.shape == (shared[0].batches, batch_size) for one in places)
    seen = [shared[0].images_at(one)[shared[0].valid(one)] for one in places]
    assert sorted(np.concatenate(seen)) == list(range(images))


@given(counts, st.integers(1, 4), batch_sizes, st.booleans(), orders, st.integers(0, 3))
def test_the_same_images_go_together_however_many_ranks_share_them(
    images, world, per_rank, shuffle, order, epoch
):
    """In every view."""
    options = {"shuffle": shuffle, "order": order, "seed": 3}
    alone = order_of(images, per_rank * world, **options)
    shared = ranks(images, per_rank, world, **options)
    assert (np.concatenate([one.places(epoch) for one in shared], axis=1) == alone.places(epoch)).all()
    by_view = [one.images_to_load(epoch).reshape(one.batches, -1, per_rank) for one in shared]
    together = np.concatenate(by_view, axis=2).reshape(alone.batches, -1)
    assert (together == alone.images_to_load(epoch)).all()


@given(counts, batch_sizes, several_views, st.integers(0, 3))
def test_views_of_a_place_show_its_image_or_for_pairs_its_class(images, batch_size, order, epoch):
    epochs = order_of(images, batch_size, order=order, shuffle=True, seed=1)
    loaded = epochs.images_to_load(epoch)
    assert loaded.shape == (epochs.batches, epochs.rows)
    by_view = loaded.reshape(epochs.batches, -1, batch_size)
    first = epochs.images_at(epochs.places(epoch))
    assert (by_view[:, 0] == first).all()
    for view in range(1, by_view.shape[1]):
        if isinstance(order, ClassPairs):
            assert (by_view[:, view] % 5 == first % 5).all()
        else:
            assert (by_view[:, view] == first).all()


@given(counts, st.integers(0, 3), batch_sizes, batch_sizes)
def test_an_image_s_partner_is_the_same_in_batches_of_any_size(images, epoch, one_size, other_size):
    found = []
    for batch_size in (one_size, other_size):
        epochs = order_of(images, batch_size, order=ClassPairs(), shuffle=True, seed=4)
        first, second = epochs.images_to_load(epoch).reshape(epochs.batches, 2, -1).transpose(1, 0, 2)
        valid = epochs.valid(epochs.places(epoch))
        found.append(dict(zip(first[valid].tolist(), second[valid].tolist(), strict=True)))
    assert found[0] == found[1]


def test_partners_are_drawn_evenly_and_anew_for_every_epoch_and_seed():
    """Classes of 30, 3 and 1 images, in no order."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [30, 3, 1]))

    def partners(epoch, seed=0):
        epochs = EpochOrder(labels, 34, shuffle=False, order=ClassPairs(), seed=seed)
        return epochs.images_to_load(epoch)[0, 34:]

    drawn = np.stack([partners(epoch) for epoch in range(600)])
    assert (labels[drawn] == labels).all()
    for size in (30, 3, 1):
        members = np.flatnonzero(np.bincount(labels)[labels] == size)
        share = np.bincount(drawn[:, members].ravel(), minlength=34)[members] / drawn[:, members].size
        # 600 draws for each image: four standard deviations of a share.
        assert abs(share - 1 / size).max() <= 4 * np.sqrt(1 / size / (600 * size))
    assert len({tuple(one) for one in drawn}) == 600
    assert (partners(0, seed=1) != drawn[0]).any()


@pytest.mark.parametrize("wrong", [lambda: Views(1), lambda: Rotations(1), lambda: Rotations(5)])
def test_views_that_there_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^(Views|Rotations): count is \d; "):
        wrong()


@given(counts, worlds, batch_sizes)
def test_evaluation_keeps_the_order_and_pads_with_the_last_image(images, world, batch_size):
    batches = np.concatenate(
        [order.images_at(order.places(5)) for order in ranks(images, batch_size, world, shuffle=False)],
        axis=1,
    ).ravel()
    assert batches[:images].tolist() == list(range(images))
    assert set(batches[images:]) <= {images - 1}


def test_training_fills_up_from_all_over_the_split_and_anywhere_in_the_epoch():
    """1,000 images in batches of 640: 280 rows too many."""
    order = order_of(1000, 640, shuffle=True)
    places = order.places(0)
    repeated = order.images_at(places)[~order.valid(places)]
    assert len(set(repeated)) == len(repeated) == 280
    assert repeated.mean() == np.clip(repeated.mean(), 450, 550)
    in_first_batch = int((~order.valid(places[0])).sum())
    assert 110 < in_first_batch < 170  # 140 +- 4 standard deviations


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = {
        tuple(order_of(50, 10, shuffle=True, seed=seed).places(epoch).ravel())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_whole_split_is_shuffled():
    count = 4000
    order = order_of(count, 100, shuffle=True).places(0).ravel()
    # Places and positions of a random permutation correlate by about 1 / sqrt(4000) = 0.016.
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.08
    assert (order[:100] > 2000).sum() > 25


@given(counts, batch_sizes, st.booleans(), orders, st.data())
def test_upcoming_continues_over_the_epochs_ends(images, batch_size, shuffle, order, data):
    epochs = order_of(images, batch_size, shuffle=shuffle, order=order, seed=1)
    first = data.draw(st.integers(0, epochs.batches - 1))
    whole = np.concatenate([epochs.images_to_load(epoch) for epoch in (2, 3, 4)])
    wanted = whole[first : first + epochs.batches + 1]
    assert (np.stack(list(islice(epochs.upcoming(2, first), len(wanted)))) == wanted).all()
