import os
import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from kdav_fast.config import DataConfig
from kdav_fast.data import build_loaders, open_images
from kdav_fast.data.sources.digits import prepare_digits
from kdav_fast.data.views import ClassPairs, Shuffled
from kdav_fast.errors import InputError
from tests.data.batches import assert_equal, order_of

CPU = torch.device("cpu")


def build(device=CPU, local_world=1, rank=0, world=1, order=Shuffled(), **config):
    data = DataConfig(**({"image_size": 8, "crop": "none", "flip": False} | config))
    return build_loaders(
        data,
        open_images(data, seed=0),
        batch_size=64,
        eval_batch_size=100,
        device=device,
        rank=rank,
        world=world,
        local_world=local_world,
        seed=0,
        normalization=SimpleNamespace(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        order=order,
    )


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_digits_end_to_end(loader):
    sets = build(loader=loader, workers=1)
    assert sets.classes == tuple("0123456789")
    train, evaluation, measure = (list(part) for part in (sets.train, sets.evaluation, sets.measure()))
    assert (len(train), len(evaluation), len(measure)) == (15, 9, 9)
    for batches, images in ((train, sets.train.images), (evaluation, sets.evaluation.images)):
        index = torch.cat([batch.index[batch.valid] for batch in batches])
        assert sorted(index.tolist()) == list(range(len(images)))
    assert torch.cat([batch.index[batch.valid] for batch in measure]).tolist() == list(range(897))
    assert not torch.equal(train[0].index, measure[0].index[:64])
    # Without augmentation an image is the same in both views.
    position = int(train[0].index[0])
    torch.testing.assert_close(train[0].images[0], measure[position // 100].images[position % 100])


@pytest.mark.parametrize("resident", [False, True])
def test_the_order_is_that_of_the_training_loaders(resident):
    sets = build(order=ClassPairs(), resident=resident, train_subset=200, workers=1)
    views = [next(iter(one)).views for one in (sets.train, sets.training(), sets.evaluation, sets.measure())]
    assert views == [2, 2, 1, 1]


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_another_training_loader_is_independent_and_the_same_each_time(loader):
    sets = build(loader=loader, crop="random_resized", train_subset=100, workers=1)
    train, training, again = (list(one) for one in (sets.train, sets.training(), sets.training()))
    assert_equal(training, again)
    assert sorted(order_of(training)) == sorted(order_of(train)) == list(range(100))
    epochs = [order_of(train), order_of(sets.train), order_of(sets.train), order_of(training)]
    assert len(set(map(tuple, epochs))) == 4
    index = [torch.cat([batch.index for batch in one]) for one in (train, training)]
    images = [torch.cat([batch.images for batch in one]) for one in (train, training)]
    for position in range(10):  # no augmentation twice either
        one, other = (i[x == position][0] for i, x in zip(images, index, strict=True))
        assert not torch.equal(one, other)


@pytest.mark.parametrize("resident", [False, True])
def test_all_training_loaders_show_the_same_fixed_views(resident):
    """And no other loader has any."""
    sets = build(crop="random_resized", views=2, resident=resident, train_subset=50, workers=1)
    seen = {}
    for batch in (*sets.train, *sets.training(), *sets.train):
        for image, view, pixels in zip(batch.index.tolist(), batch.view.tolist(), batch.images, strict=True):
            assert torch.equal(seen.setdefault((image, view), pixels), pixels)
    assert len(seen) == 100
    assert [next(iter(one)).view for one in (sets.evaluation, sets.measure())] == [None, None]


def test_subset_and_own_root(tmp_path):
    sets = build(loader="torchvision", root=tmp_path / "digits", train_subset=100)
    assert sets.train.images_per_epoch == sets.measure().images_per_epoch == 100
    assert sets.evaluation.images_per_epoch == 900
    assert sets.train.images.root == tmp_path / "digits"


def test_a_folder_is_opened_as_it_is(tmp_path):
    root = prepare_digits(tmp_path / "digits")
    assert build(name="folder", root=root).train.images_per_epoch == 897


def test_workers_are_the_rank_s_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)))
    assert build(local_world=3).train.workers == 3
    assert build(local_world=30).train.workers == 1
    assert build(local_world=3, workers=7).train.workers == 7


def test_gpu_decoding_needs_a_gpu_and_dali():
    with pytest.raises(
        InputError, match=r"data\.decode is 'gpu' but the device is 'cpu'; set data\.decode=cpu"
    ):
        build(decode="gpu")
    with pytest.raises(
        InputError, match=r"data\.loader=torchvision decodes on the CPU; set data\.loader=dali"
    ):
        build(decode="gpu", loader="torchvision", device=torch.device("cuda"))


@pytest.mark.parametrize("key", [{"hw_decoder_load": 0.5}, {"fancy_upsampling": True}])
def test_keys_of_the_gpu_s_decoder_are_refused_where_the_cpu_decodes(key):
    (name,) = key
    told = rf"data\.{name} is .* but images are decoded on the CPU; set data\.{name}=null"
    for options in ({}, {"decode": "cpu", "device": torch.device("cuda")}, {"loader": "torchvision"}):
        with pytest.raises(InputError, match=told):
            build(**key, **options)
    with pytest.raises(ValidationError, match=rf"data\.{name} is of JPEG files.*'cifar10' are none; drop it"):
        DataConfig(name="cifar10", root="x", **key)


def test_missing_dali_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "kdav_fast.data.dali", raising=False)
    monkeypatch.delattr("kdav_fast.data.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(
        InputError, match=r"nvidia-dali-cuda130 cannot be imported .*set data\.loader=torchvision"
    ):
        build()
    assert build(loader="torchvision").train.images_per_epoch == 897


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no train/ folder"):
        build(name="folder", root=tmp_path)
