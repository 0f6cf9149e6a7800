"""Saving a loader's position and continuing there: exactly, or not at all."""

from dataclasses import replace

import pytest
import torch

from kdav_fast.data.dali import DaliLoader
from kdav_fast.data.preprocessing import (
    CenterCrop,
    PaddedCrop,
    RandAugment,
    TrivialAugment,
)
from kdav_fast.data.torchvision_loader import TorchvisionLoader
from kdav_fast.data.views import ClassPairs, Rotations, Views
from kdav_fast.errors import InputError
from tests.data.batches import AUGMENTED, assert_equal, assert_same_images


@pytest.mark.parametrize("taken_after", [0, 1, 2, 3, 4, 7])
def test_restore_is_exact(make_loader, noise_split, as_source, through_json, taken_after):
    """Three steps an epoch: at the start, in the middle, at the end of the first and in later epochs."""
    images = as_source(noise_split)
    loader = make_loader(images, **AUGMENTED)

    def steps(loader, count):
        while count > 0:
            for batch in loader:
                yield batch
                count -= 1
                if count == 0:
                    return

    list(steps(loader, taken_after))
    state = through_json(loader.state_dict())
    restored = make_loader(images, **AUGMENTED)
    restored.load_state_dict(state)
    assert through_json(restored.state_dict()) == state
    assert_equal(list(restored), list(loader))
    assert_equal(list(restored), list(loader))


def test_a_used_loader_can_go_back(make_loader, noise_split, through_json):
    loader = make_loader(noise_split, **AUGMENTED)
    state = through_json(loader.state_dict())
    first = list(loader)
    loader.load_state_dict(state)
    assert_equal(list(loader), first)


def test_a_state_taken_inside_the_loop_counts_the_batch_in_use(make_loader, noise_split):
    loader = make_loader(noise_split, **AUGMENTED)
    states = [loader.state_dict() for _ in loader]
    assert [(state["epoch"], state["step"]) for state in states] == [(0, 1), (0, 2), (1, 0)]


def test_an_abandoned_epoch_goes_on_where_it_was_left(make_loader, noise_split):
    loader, reference = (make_loader(noise_split, **AUGMENTED) for _ in range(2))
    first = next(iter(loader))
    assert_equal([first, *loader], list(reference))


@pytest.mark.parametrize("order", [Views(3), Rotations(4), ClassPairs()])
def test_every_order_is_restored_in_the_middle_of_an_epoch(
    make_loader, noise_split, as_source, through_json, order
):
    images, options = as_source(noise_split), {**AUGMENTED, "order": order}
    loader = make_loader(images, **options)
    for _ in range(2):
        next(iter(loader))
    restored = make_loader(images, **options)
    restored.load_state_dict(through_json(loader.state_dict()))
    rest = [*restored, *restored]
    assert len(rest) == 1 + 3
    assert_equal(rest, [*loader, *loader])


@pytest.mark.parametrize("augment", [None, RandAugment(3, 20), TrivialAugment()])
@pytest.mark.parametrize("crop", [CenterCrop(8), PaddedCrop(2)])
def test_every_augmentation_is_restored(make_loader, noise_split, through_json, crop, augment):
    options = {"crop": crop, "shuffle": True, "preprocessing": {"augment": augment, "flip": True}}
    loader = make_loader(noise_split, **options)
    next(iter(loader))
    restored = make_loader(noise_split, **options)
    restored.load_state_dict(through_json(loader.state_dict()))
    assert_equal([*restored, *restored], [*loader, *loader])


@pytest.mark.parametrize("change", [{"world": 2}, {"world": 2, "rank": 1}, {"batch_size": 3}])
def test_another_sharding_restarts_the_epoch_if_allowed(make_loader, noise_split, through_json, change):
    options = AUGMENTED | {"on_reshard": "restart_epoch"}
    saved = make_loader(noise_split, **AUGMENTED)
    for _ in range(2):
        list(saved)
    next(iter(saved))
    state = through_json(saved.state_dict())
    assert (state["epoch"], state["step"]) == (2, 1)
    loader = make_loader(noise_split, **(options | change))
    loader.load_state_dict(state)
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (2, 0)
    # The whole of that epoch follows, in the order that a run with this sharding would have had.
    fresh = make_loader(noise_split, **(options | change))
    epochs = [list(fresh) for _ in range(3)]
    batches = list(loader)
    assert_same_images(batches, epochs[2])
    # Its augmentation is not that of the first epoch again, and it is restored as exactly as any other.
    assert not torch.equal(batches[0].images, epochs[0][0].images)
    again = make_loader(noise_split, **(options | change))
    again.load_state_dict(through_json(loader.state_dict()))
    assert_equal(list(again), list(loader))


def test_the_same_sharding_continues_where_it_was_whatever_is_allowed(make_loader, noise_split):
    loader = make_loader(noise_split, on_reshard="restart_epoch", **AUGMENTED)
    next(iter(loader))
    restored = make_loader(noise_split, on_reshard="restart_epoch", **AUGMENTED)
    restored.load_state_dict(loader.state_dict())
    assert_equal(list(restored), list(loader))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("images", {"count": 8}),
        ("digest", {"rename": True}),
        ("split", {"split": "val"}),
        ("batch_size", {"batch_size": 2}),
        ("world", {"world": 2}),
        ("rank", {"world": 2, "rank": 1}),
        ("seed", {"seed": 1}),
        ("order", {"order": Views(2)}),
        ("order", {"order": ClassPairs()}),
        ("preprocessing", {"preprocessing": {"flip": True}}),
        ("loader", {"other_loader": True}),
    ],
)
def test_a_state_of_something_else_is_refused(loader_class, make_loader, numbered_split, key, change):
    options = dict(change)
    folder = numbered_split(options.pop("count", 9), options.pop("split", "train"))
    if options.pop("rename", False):
        folder = replace(folder, labels=folder.labels[::-1].copy())
    if options.pop("other_loader", False):
        options["loader_class"] = TorchvisionLoader if loader_class is DaliLoader else DaliLoader
    saved_options = {"world": 2} if key == "rank" else {}
    state = make_loader(numbered_split(9), **saved_options).state_dict()
    loader = make_loader(folder, **options)
    with pytest.raises(
        InputError, match=rf"saved position in the \w+ images is of {key} .*resume with"
    ) as error:
        loader.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (0, 0)


@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
def test_dali_says_so_when_a_checkpoint_does_not_fit(make_loader, numbered_split):
    saved = make_loader(numbered_split(4), crop=PaddedCrop(1))
    next(iter(saved))
    state = saved.state_dict()
    loader = make_loader(numbered_split(4), crop=CenterCrop(8))
    state["preprocessing"] = loader.state_dict()["preprocessing"]
    loader.load_state_dict(state)
    with pytest.raises(InputError, match="does not fit this DALI pipeline; resume with the DALI version"):
        list(loader)
