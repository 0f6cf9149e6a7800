"""What is put into a cache comes out again, as far as its formats go; the files are what safetensors takes them for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.special import log_softmax, logsumexp

from kdav_fast.errors import InputError
from kdav_fast.teachers.cache import AnswerCache, CacheCard, Layout, Parameter, ShardDraft, prepare
from kdav_fast.teachers.cache.stored import to_answers, to_stored
from tests.teachers.cache.small_cache import FACTS, KnownAnswers, every_view, make, small_card

ROUNDED = {
    "fp32": lambda values: values.numpy(),
    "fp16": lambda values: values.numpy().astype(np.float16).astype(np.float32),
    "bf16": lambda values: values.bfloat16().float().numpy(),
}

layouts = st.builds(
    lambda classes, top, **others: Layout(
        classes=classes, top=top if top is not None and top < classes else None, **others
    ),
    images=st.integers(1, 9),
    views=st.integers(1, 4),
    classes=st.integers(2, 7),
    width=st.integers(1, 5),
    features=st.sampled_from([None, "fp16", "bf16", "fp32"]),
    logits=st.sampled_from(["fp16", "fp32"]),
    top=st.one_of(st.none(), st.integers(1, 6)),
    parameters=st.dictionaries(
        st.sampled_from(["box", "flip", "angle"]),
        st.builds(
            Parameter,
            dtype=st.sampled_from(["fp64", "fp32", "int32", "int16", "uint8", "bool"]),
            width=st.integers(1, 4),
        ),
    ),
    shard_bytes=st.integers(1, 600),
)


@settings(max_examples=30, deadline=None)
@given(layout=layouts, order=st.randoms(use_true_random=False))
def test_every_format_and_size_comes_back(tmp_path_factory, layout, order):
    folder = tmp_path_factory.mktemp("cache")
    card, known = CacheCard(layout=layout, facts=FACTS), KnownAnswers(layout)
    make(folder, card)
    cache = AnswerCache(folder)
    cache.verify()
    index, view = every_view(range(layout.images), layout.views)
    asked = order.choices(range(len(index)), k=2 * len(index))  # some twice, some not at all, in any order
    index, view = index[asked], view[asked]
    features, logits = cache.answers(index, view)
    parameters = cache.parameters(index, view)

    if layout.features is None:
        assert features is None
    else:
        np.testing.assert_array_equal(features, ROUNDED[layout.features](known.features[index, view]))
    truth = known.logits[index, view]
    if layout.top is None:
        np.testing.assert_array_equal(logits, ROUNDED[layout.logits](truth))
    else:
        np.testing.assert_allclose(logits, truncated(truth.numpy(), layout.top), rtol=2e-3, atol=2e-3)
    assert parameters.keys() == known.parameters.keys()
    for name, values in parameters.items():
        np.testing.assert_array_equal(values, known.parameters[name][index, view])
    for shard in range(layout.shards):  # by another reader
        assert load_file(folder / f"shard-{shard:06d}.safetensors").keys() == {p.name for p in layout.parts}


def truncated(logits, top):
    """Every class but the highest shares their mass, by softmax in float64."""
    logits = logits.astype(np.float64)
    result = np.empty_like(logits)
    for row, values in zip(result, logits, strict=True):
        others = np.argsort(values)[:-top]
        row[:] = values
        row[others] = logsumexp(values[others]) - np.log(len(others))
    return result


@pytest.mark.parametrize("classes", [1_000, 21_841, 65_536, 65_537])
def test_any_number_of_classes_and_the_probabilities_of_those_kept(classes):
    top = 20
    layout = Layout(images=1, views=1, classes=classes, width=1, features=None, logits="fp32", top=top)
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(classes)) * 3
    logits[0, classes - 1], logits[1, 0] = 20.0, 15.0  # the first and the last class are among them
    stored = to_stored(layout, None, logits)
    assert stored["top_classes"].dtype == (torch.uint16 if classes <= 65_536 else torch.int32)
    restored = to_answers(layout, stored)[1].numpy()
    np.testing.assert_allclose(restored, truncated(logits.numpy(), top), rtol=1e-5, atol=1e-5)
    highest = np.argsort(logits.numpy(), 1)[:, -top:]
    there, here = (
        np.take_along_axis(log_softmax(values.astype(np.float64), 1), highest, 1)
        for values in (logits.numpy(), restored)
    )
    np.testing.assert_allclose(here, there, atol=1e-5)


def test_of_equal_logits_the_lower_classes_are_kept_in_whatever_batch():
    layout = Layout(images=1, views=1, classes=300, width=1, features=None, top=4)
    rows = torch.zeros(5, 300)
    rows[:, 7] = torch.arange(5)
    stored = to_stored(layout, None, rows)
    assert stored["top_classes"].tolist() == [[0, 1, 2, 3]] + [[7, 0, 1, 2]] * 4
    alone = to_stored(layout, None, rows[3:4])
    assert all(torch.equal(stored[name][3:4], values) for name, values in alone.items())


def test_a_file_says_which_shard_of_which_cache_it_is(tmp_path):
    card = small_card()
    make(tmp_path, card)
    with safe_open(tmp_path / "shard-000001.safetensors", "pt") as file:
        said = file.metadata()
        features = file.get_tensor("features")
    assert said["cache"] == card.name
    assert said["shard"] == "000001"
    truth = KnownAnswers(card.layout).features[3:6].reshape(6, 3)  # images 3, 4, 5, each in both views
    np.testing.assert_array_equal(features, truth.half())


def test_the_order_in_which_views_are_put_does_not_show(tmp_path):
    card = small_card(top=2)
    make(tmp_path / "a", card, batch=100)
    make(tmp_path / "b", card, batch=1)
    known = KnownAnswers(card.layout)
    for shard in prepare(tmp_path / "c", card):
        draft = ShardDraft(tmp_path / "c", card, shard)
        index, view = every_view(draft.images, card.layout.views)
        known.put(draft, index[::-1].copy(), view[::-1].copy())
        draft.write()
    of = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"]
    assert of[0] == of[1] == of[2]


def test_what_does_not_fit_its_format_is_refused_by_name(tmp_path):
    card = small_card(parameters={})
    prepare(tmp_path, card)
    draft = ShardDraft(tmp_path, card, 1)
    index, view = np.array([3, 4]), np.array([0, 1])
    fine, large = torch.zeros(2, 5), torch.tensor([[0.0] * 5, [7e4] + [0.0] * 4])
    with pytest.raises(
        InputError, match=r"teacher's logits of view 1 of image 4 are not finite in fp16, .* fp32"
    ):
        draft.put(index, view, torch.zeros(2, 3), large)
    with pytest.raises(InputError, match="teacher's features of view 0 of image 3 are not finite"):
        draft.put(index, view, torch.full((2, 3), torch.nan), fine)
    draft.put(index, view, torch.zeros(2, 3), fine)  # nothing of what was refused is taken for done


def test_a_draft_takes_each_of_its_views_once_and_is_written_when_it_has_all(tmp_path):
    card = small_card()
    prepare(tmp_path, card)
    draft, known = ShardDraft(tmp_path, card, 1), KnownAnswers(card.layout)
    with pytest.raises(ValueError, match="not of shard 1"):
        known.put(draft, np.array([2]), np.array([0]))
    known.put(draft, np.array([3]), np.array([0]))
    for index, view in (([3], [0]), ([4, 4], [1, 1])):
        with pytest.raises(ValueError, match="come twice"):
            known.put(draft, np.array(index), np.array(view))
    with pytest.raises(ValueError, match="5 of the 6 views of shard 1 are missing"):
        draft.write()
    features, logits = torch.zeros(1, 3), torch.zeros(1, 5)
    box, flip = np.zeros((1, 4), np.float32), np.zeros(1, bool)
    for parameters in (None, {"box": box}, {"box": box.astype(np.float64), "flip": flip}):
        with pytest.raises(ValueError, match="the cache keeps"):
            draft.put(np.array([4]), np.array([0]), features, logits, parameters)
    draft.put(np.array([4]), np.array([0]), features, logits, {"box": box, "flip": flip})


@pytest.mark.parametrize(("index", "view"), [(7, 0), (-1, 0), (0, 2), (0, -1)])
def test_there_are_no_other_images_and_views(tmp_path, index, view):
    make(tmp_path, small_card())
    with pytest.raises(IndexError, match="none of the cache's"):
        AnswerCache(tmp_path).answers(np.array([0, index]), np.array([0, view]))


def test_no_views_are_no_answers(tmp_path):
    make(tmp_path, small_card())
    nothing = np.empty(0, np.int64)
    features, logits = AnswerCache(tmp_path).answers(nothing, nothing)
    assert features.shape == (0, 3)
    assert logits.shape == (0, 5)
