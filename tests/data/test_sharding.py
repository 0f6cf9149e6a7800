import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdav_fast.data.sharding import Shard
from kdav_fast.errors import InputError


@given(st.data(), st.integers(1, 8), st.integers(1, 9))
def test_every_image_once_and_equal_steps(data, world, batch_size):
    images = data.draw(st.integers(world, 200))
    order = np.random.default_rng(images).permutation(images)
    shards = [Shard(images, batch_size, rank, world) for rank in range(world)]
    assert len({shard.steps for shard in shards}) == 1
    seen = []
    for shard in shards:
        batches = shard.batches(order)
        valid = np.stack([shard.valid(step) for step in range(shard.steps)])
        assert batches.shape == valid.shape == (shard.steps, batch_size)
        own = batches[valid]
        assert set(batches.flat) == set(own)
        # Padding stands behind everything else and repeats the last image.
        assert (batches.flat[len(own) :] == own[-1]).all()
        seen += own.tolist()
    assert seen == order.tolist()
    assert shards[0].steps == -(-max(shard.stop - shard.start for shard in shards) // batch_size)


def test_more_ranks_than_images_are_refused():
    with pytest.raises(InputError, match="2 images cannot be shared by 3 ranks; use at most 2 ranks"):
        Shard(2, 1, 0, 3)
