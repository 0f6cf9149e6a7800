"""What a caller gives that is not what was asked for: it is refused, and never stored or answered as something else."""

import math
import os
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kdav_fast.errors import InputError
from kdav_fast.teachers.cache import AnswerCache, CacheCard, Layout, Parameter, ShardDraft, prepare
from tests.teachers.cache.small_cache import every_view, make, small_card

LAYOUT = Layout(images=1, views=2, classes=5, width=4, parameters={"box": Parameter(dtype="fp32", width=4)})
FEATURES, LOGITS, BOX = torch.ones(2, 4), torch.ones(2, 5), np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("features", "logits", "box", "said"),
    [
        (torch.ones(1, 4), LOGITS, BOX, r"features of 2 views are of shape \(1, 4\); give \(2, 4\)"),
        (None, LOGITS, BOX, "features of 2 views are of shape None"),
        (FEATURES, torch.ones(2, 1), BOX, r"logits of 2 views are of shape \(2, 1\); give \(2, 5\)"),
        (FEATURES, torch.ones(2, 3), BOX, "logits"),
        (FEATURES, torch.ones(5), BOX, "logits"),
        (FEATURES, LOGITS, BOX[:, :1], r"box is of shape \(2, 1\); give \(2, 4\)"),
        (FEATURES, LOGITS, BOX.reshape(-1), "box is of shape"),
    ],
)
@pytest.mark.parametrize("top", [None, 2])
def test_answers_of_another_shape_are_not_repeated(tmp_path, features, logits, box, said, top):
    card = CacheCard(layout=LAYOUT.model_copy(update={"top": top}), facts={})
    prepare(tmp_path / "cache", card)
    draft = ShardDraft(tmp_path / "cache", card, 0)
    with pytest.raises(ValueError, match=said):
        draft.put([0, 0], [0, 1], features, logits, {"box": box})
    draft.put([0, 0], [0, 1], FEATURES, LOGITS, {"box": BOX})
    draft.write()


def test_there_is_no_draft_of_a_shard_that_there_is_not(tmp_path):
    card = small_card()
    prepare(tmp_path / "cache", card)
    for shard in (-1, 3):
        with pytest.raises(ValueError, match=f"no shard {shard}; the cache has 3"):
            ShardDraft(tmp_path / "cache", card, shard)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"views": {"seed": 0}}, "'views' is named as a key of the layout"),
        ({"of_class": {1: 500}}, "of_class has the key 1; keys must be text"),
        ({"lr": {"first": math.nan}}, "lr.first is nan"),
        ({"folder": os}, "folder is <module"),
    ],
)
def test_facts_are_what_a_file_gives_back(facts, said):
    with pytest.raises(ValidationError, match=said):
        CacheCard(layout=LAYOUT, facts=facts)


def test_what_is_required_of_a_layout_is_in_it(tmp_path):
    make(tmp_path / "cache", small_card())
    with pytest.raises(TypeError, match="'image' is no key of the layout; allowed: images, views"):
        AnswerCache(tmp_path / "cache").require({}, image=3)


@pytest.mark.parametrize("name", ["A b", "a\n", "a.b", ""])
def test_names_of_parameters_are_plain(name):
    with pytest.raises(ValidationError):
        Layout(images=1, views=1, classes=2, width=1, parameters={name: Parameter(dtype="bool", width=1)})


def test_narrow_numbers_find_the_same_views():
    layout = Layout(images=300, views=200, classes=3, width=1, shard_bytes=10**9)
    wide = layout.places(np.array([290]), np.array([150]))
    for kind in (np.int16, np.uint16, np.int32):
        assert layout.places(np.array([290], kind), np.array([150], kind)) == wide


@pytest.mark.parametrize("damage", ["another", "shorter", "gone", "pipe"])
def test_a_shard_that_changed_since_the_cache_was_opened_is_named(tmp_path, damage):
    folder, other = tmp_path / "cache", tmp_path / "other"
    make(folder, small_card())
    make(other, CacheCard(layout=small_card().layout, facts={"seed": 2}))
    cache, shard = AnswerCache(folder), folder / "shard-000001.safetensors"
    if damage == "another":
        shutil.copy(other / shard.name, shard)
    elif damage == "shorter":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        shard.unlink()
    if damage == "pipe":
        os.mkfifo(shard)
    index, view = every_view([0], 2)
    cache.answers(index, view)  # of another shard
    with pytest.raises(InputError, match=shard.name):
        cache.answers(index + 3, view)
