"""What is said of a cache's size before it is made is what its files have."""

from pathlib import Path

import cache_sizes
import pytest

from kdav_fast.teachers.cache import CacheCard, Layout, Parameter
from kdav_fast.teachers.cache.shard_file import cache_size
from tests.teachers.cache.small_cache import FACTS, make, small_card

PAGE = Path(__file__).parents[3] / "docs" / "cached-teacher.md"


@pytest.mark.parametrize(
    "changes", [{}, {"images": 6}, {"top": 3, "features": None}, {"images": 1, "views": 1}]
)
def test_the_total_is_that_of_the_files(tmp_path, changes):
    card = small_card(**changes)
    make(tmp_path, card)
    sizes = [file.stat().st_size for file in tmp_path.glob("shard-*")]
    assert len(sizes) == card.layout.shards
    assert sum(sizes) == cache_size(card)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({}, 512 * 2 + 1000 * 2),
        ({"features": "fp32", "logits": "fp32"}, 512 * 4 + 1000 * 4),
        ({"top": 10}, 512 * 2 + 10 * (2 + 2) + 2),
        ({"top": 10, "logits": "fp32", "features": None}, 10 * (4 + 2) + 4),
        ({"classes": 21_841, "top": 10, "features": None}, 10 * (2 + 2) + 2),
        ({"classes": 65_537, "top": 10, "features": None}, 10 * (2 + 4) + 2),
        ({"top": 10, "parameters": cache_sizes.CROP_AND_FLIP}, 512 * 2 + 10 * (2 + 2) + 2 + 4 * 4 + 1),
        ({"parameters": {"angle": Parameter(dtype="fp64", width=1)}}, 512 * 2 + 1000 * 2 + 8),
    ],
)
def test_bytes_of_a_view(layout, expected):
    assert (
        Layout(**{"images": 1, "views": 1, "classes": 1000, "width": 512, **layout}).bytes_per_view
        == expected
    )


def test_shards_have_the_size_asked_for_and_at_least_one_image():
    layout = cache_sizes.imagenet(views=50, top=None, features=True)
    size = layout.records_of(0) * layout.bytes_per_view
    assert 0.99 * 2**26 < size <= 2**26
    assert layout.images_of(layout.shards - 1).stop == layout.images
    huge = Layout(images=3, views=300, classes=21_841, width=2048, logits="fp32", shard_bytes=2**20)
    assert (huge.images_per_shard, huge.shards) == (1, 3)


def test_logits_of_fewer_classes_than_there_are_can_be_kept():
    with pytest.raises(ValueError, match="top is 5 of 5 classes"):
        small_card(top=5)


def test_cards_of_equal_facts_are_equal_whatever_their_order():
    layout = small_card().layout
    cards = [
        CacheCard(layout=layout, facts=dict(facts)) for facts in (FACTS.items(), reversed(FACTS.items()))
    ]
    assert cards[0].name == cards[1].name


def test_the_page_s_table_is_this_one():
    assert "\n".join(cache_sizes.size_table()) in PAGE.read_text(encoding="utf-8")
