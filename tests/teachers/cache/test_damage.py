"""What is wrong with a cache is found and named, and nothing but that is made again."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdav_fast.errors import InputError
from kdav_fast.teachers.cache import AnswerCache, CacheCard, read_card
from kdav_fast.teachers.cache import card as card_module
from tests.checkpoint.small_folders import flip_bit
from tests.teachers.cache.small_cache import FACTS, contents, make, small_card

SECOND = "shard-000001.safetensors"
CARD = small_card(top=2, features="bf16")


@pytest.fixture
def folder(tmp_path, made_once):
    """A copy of a whole cache."""
    whole = made_once("teacher-cache", lambda folder: make(folder, CARD))
    return shutil.copytree(whole, tmp_path / "cache")


def test_a_flipped_bit_is_found_wherever_it_is_and_mended(folder):
    """In the header at opening, in the sum and what follows by the sums."""
    whole = contents(folder)
    content = whole[SECOND]
    begin = 8 + int.from_bytes(content[:8], "little")
    sum_at = content.index(b'"sha256":"') + len(b'"sha256":"')
    places = {
        *range(0, begin, 41),
        0,
        7,
        8,
        begin - 1,
        sum_at,
        sum_at + 63,
        *range(begin, len(content), 29),
        -1,
    }
    for bit, place in enumerate(sorted(places)):
        flip_bit(folder / SECOND, place, bit % 8)
        in_header = 0 <= place < begin and not sum_at <= place < sum_at + 64
        with pytest.raises(
            InputError, match=re.escape(f"1 of the 3 shards of the teacher's cache {folder}")
        ) as said:
            AnswerCache(folder).verify()
        assert ("has other content than was written" in str(said.value)) is not in_header, place
        assert SECOND in str(said.value)
        (folder / SECOND).write_bytes(content)
    flip_bit(folder / SECOND, -1)
    assert list(make(folder, CARD)) == [1]
    assert contents(folder) == whole


DAMAGE = {
    "missing": (lambda file: file.unlink(), f"{SECOND} is missing"),
    "empty": (lambda file: os.truncate(file, 0), f"{SECOND} is empty"),
    "cut in its header": (
        lambda file: os.truncate(file, 100),
        f"{SECOND} has another header than was written",
    ),
    "cut in its end": (lambda file: os.truncate(file, file.stat().st_size - 1), f"{SECOND} has "),
    "longer": (lambda file: os.truncate(file, file.stat().st_size + 1), f"{SECOND} has "),
    "another shard": (
        lambda file: shutil.copy(file.with_name("shard-000000.safetensors"), file),
        f"{SECOND} holds shard 0",
    ),
    "of another cache": (
        lambda file: (
            make(file.parent / "other", small_card()),
            (file.parent / "other" / SECOND).replace(file),
        ),
        f"{SECOND} is of another cache",
    ),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), f"{SECOND} is no file"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_shard_that_is_not_whole_is_named_at_opening(folder, damage, said):
    damage(folder / SECOND)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        AnswerCache(folder)
    assert str(error.value).endswith("let what made the cache run again, which makes these and no others")


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "a folder"])
def test_only_what_is_damaged_is_made_again(folder, damage):
    whole = contents(folder)
    DAMAGE[damage][0](folder / SECOND)
    shutil.rmtree(folder / "other", ignore_errors=True)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != SECOND}
    assert list(make(folder, CARD)) == [1]
    assert contents(folder) == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times


def test_many_damaged_shards_are_counted(folder):
    for shard in range(3):
        (folder / f"shard-{shard:06d}.safetensors").unlink()
    with pytest.raises(InputError, match="3 of the 3 shards"):
        AnswerCache(folder)


CARDS = {
    "missing": (lambda file: file.unlink(), "cache.json: No such file or directory"),
    "a flipped bit": (
        lambda file: file.write_bytes(file.read_bytes().replace(b'"views": 2', b'"views": 3')),
        "cache.json has other content than was written",
    ),
    "cut": (lambda file: os.truncate(file, 50), "cache.json is not the card of a cache"),
    "something else": (lambda file: file.write_text("[1]"), "cache.json is not the card of a cache"),
}


@pytest.mark.parametrize(("damage", "said"), CARDS.values(), ids=CARDS)
def test_a_damaged_card_is_named_and_made_again_and_no_shard_with_it(folder, damage, said):
    whole = contents(folder)
    damage(folder / "cache.json")
    with pytest.raises(InputError, match=f"{re.escape(str(folder))} is no teacher's cache: {said}"):
        AnswerCache(folder)
    assert list(make(folder, CARD)) == []
    assert contents(folder) == whole


def test_any_flipped_bit_of_a_card_is_found(folder):
    file = folder / "cache.json"
    for place in range(0, file.stat().st_size, 7):
        flip_bit(file, place, place % 8)
        assert card_module.found_card(folder)[0] is None, place
        flip_bit(file, place, place % 8)
    assert read_card(folder) == CARD


def test_a_later_format_is_named(folder):
    later = CacheCard.model_construct(format=2, layout=CARD.layout, facts=FACTS)
    card_module.write_card(folder, later)
    with pytest.raises(InputError, match="is of format 2, and this version reads format 1"):
        read_card(folder)


def test_facts_are_the_same_as_tuples_or_lists(folder):
    assert list(make(folder, CacheCard(layout=CARD.layout, facts={**FACTS, "mean": (0.5, 0.5, 0.5)}))) == []


def test_another_cache_is_not_written_over(folder):
    whole = contents(folder)
    other = CacheCard(layout=small_card(top=3, features="bf16").layout, facts={**FACTS, "seed": 2})
    with pytest.raises(InputError, match="seed is 1 there and 2 here.*top is 2 there and 3 here"):
        make(folder, other)
    (folder / "cache.json").unlink()
    with pytest.raises(
        InputError, match=r"holds shards of another cache \(shard-000000.safetensors is of another"
    ):
        make(folder, other)
    del whole["cache.json"]
    assert contents(folder) == whole


def test_a_run_is_told_all_that_differs(folder):
    cache = AnswerCache(folder)
    cache.require(FACTS, images=7, views=2)
    cache.require({**FACTS, "mean": (0.5, 0.5, 0.5)})  # as JSON says it
    there = {**FACTS, "teacher": {"name": "cifar:resnet20", "sha256": "cd"}, "mixup": 0.2}
    del there["mean"]
    with pytest.raises(InputError) as said:
        cache.require(there, images=8, views=2)
    assert str(said.value) == (
        f"the teacher's cache {folder} is of something else than this run: images is 7 there and 8 here; mean is [0.5, "
        "0.5, 0.5] there and not given here; mixup is not given there and 0.2 here; teacher.sha256 is 'ab' there and "
        "'cd' here; give this run what the cache was made with, or a cache of its own"
    )


def test_other_data_are_told_by_their_first_difference():
    section = {"first": "cat/0.jpg", "images": 1, "names": "a", "sizes": "b", "content": "c"}
    data = {"train": {"images": 1, "classes": "d", "sections": [section]}}
    changed = {"train": {**data["train"], "sections": [{**section, "content": "x"}]}}
    found = list(card_module.differences({"data": data}, {"data": changed}))
    assert found == ["the data: cat/0.jpg has other content"]


def test_reading_keeps_no_file_open(folder):
    def opened():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    cache, before = AnswerCache(folder), opened()
    cache.answers(np.arange(7), np.zeros(7, np.int64))
    assert opened() == before
