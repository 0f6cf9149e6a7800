from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdav_fast.data.order import EpochOrder

counts, worlds, batch_sizes = st.integers(1, 200), st.integers(1, 8), st.integers(1, 9)


def ranks(images, batch_size, world, **options):
    return [EpochOrder(images, batch_size, rank=rank, world=world, **options) for rank in range(world)]


@given(counts, worlds, batch_sizes, st.booleans(), st.integers(0, 3))
def test_every_image_once_and_equal_steps(images, world, batch_size, shuffle, epoch):
    orders = ranks(images, batch_size, world, shuffle=shuffle, seed=7)
    assert {order.steps for order in orders} == {-(-images // (batch_size * world))}
    places = [order.places(epoch) for order in orders]
    assert all(one.shape == (orders[0].steps, batch_size) for one in places)
    seen = [orders[0].images_at(one)[orders[0].valid(one)] for one in places]
    assert sorted(np.concatenate(seen)) == list(range(images))


@given(counts, st.integers(1, 4), batch_sizes, st.booleans(), st.integers(0, 3))
def test_a_step_takes_the_same_images_however_many_ranks_share_it(images, world, per_rank, shuffle, epoch):
    alone = EpochOrder(images, per_rank * world, shuffle=shuffle, seed=3)
    shared = ranks(images, per_rank, world, shuffle=shuffle, seed=3)
    assert (np.concatenate([order.places(epoch) for order in shared], axis=1) == alone.places(epoch)).all()


@given(counts, worlds, batch_sizes)
def test_evaluation_keeps_the_order_and_pads_with_the_last_image(images, world, batch_size):
    steps = np.concatenate(
        [order.images_at(order.places(5)) for order in ranks(images, batch_size, world, shuffle=False)],
        axis=1,
    ).ravel()
    assert steps[:images].tolist() == list(range(images))
    assert set(steps[images:]) <= {images - 1}


def test_training_fills_up_from_all_over_the_split_and_anywhere_in_the_epoch():
    """1,000 images in steps of 640: 280 rows too many."""
    order = EpochOrder(1000, 640, shuffle=True)
    places = order.places(0)
    repeated = order.images_at(places)[~order.valid(places)]
    assert len(set(repeated)) == len(repeated) == 280
    assert repeated.mean() == np.clip(repeated.mean(), 450, 550)
    in_first_step = int((~order.valid(places[0])).sum())
    assert 110 < in_first_step < 170  # 140 +- 4 standard deviations


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = {
        tuple(EpochOrder(50, 10, shuffle=True, seed=seed).places(epoch).ravel())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_whole_split_is_shuffled():
    count = 4000
    order = EpochOrder(count, 100, shuffle=True).places(0).ravel()
    # Places and positions of a random permutation correlate by about 1 / sqrt(4000) = 0.016.
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.08
    assert (order[:100] > 2000).sum() > 25


@given(counts, batch_sizes, st.booleans(), st.data())
def test_upcoming_continues_over_the_epochs_ends(images, batch_size, shuffle, data):
    order = EpochOrder(images, batch_size, shuffle=shuffle, seed=1)
    step = data.draw(st.integers(0, order.steps - 1))
    whole = np.concatenate([order.images_at(order.places(epoch)) for epoch in (2, 3, 4)])
    wanted = whole[step : step + order.steps + 1]
    assert (np.stack(list(islice(order.upcoming(2, step), len(wanted)))) == wanted).all()
