"""What a batch of several views shows, of every loader and every kind of source."""

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from kdav_fast.data.dali import DaliLoader
from kdav_fast.data.torchvision_loader import TorchvisionLoader
from kdav_fast.data.views import ClassPairs, Rotations, Views
from tests.data.batches import AUGMENTED, assert_same_images, order_of


def views_of(batch) -> torch.Tensor:
    """V x B x 3 x S x S."""
    return batch.images.unflatten(0, (batch.views, len(batch.index)))


def shown_by(batch) -> torch.Tensor:
    """V x B positions, read off images of `numbered_split`."""
    grey = views_of(batch) * 255
    assert torch.equal(grey.amin((2, 3, 4)), grey.amax((2, 3, 4)))
    return grey[:, :, 0, 0, 0].round().long()


@pytest.mark.parametrize("order", [Views(3), Rotations(4), ClassPairs()])
@pytest.mark.parametrize("world", [1, 2])
def test_rows_are_view_major_and_everything_else_is_of_the_image(
    make_loader, numbered_split, as_source, order, world
):
    folder = numbered_split(10)
    options = {"shuffle": True, "order": order, "world": world}
    loaders = [make_loader(as_source(folder), rank=rank, **options) for rank in range(world)]
    for _ in range(2):
        epochs = [list(loader) for loader in loaders]
        for batch in chain.from_iterable(epochs):
            assert batch.views == order.count
            assert batch.images.shape == (order.count * 4, 3, 8, 8)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.index.shape == batch.labels.shape == batch.valid.shape == (4,)
            shown = shown_by(batch)
            assert torch.equal(shown[0], batch.index)
            if isinstance(order, ClassPairs):
                shown = torch.from_numpy(folder.labels)[shown]
                assert torch.equal(shown[1], batch.labels)
            else:
                assert (shown == batch.index).all()
        assert sorted(order_of(chain.from_iterable(epochs))) == list(range(10))


@pytest.mark.parametrize("order", [Views(3), ClassPairs()])
def test_every_loader_and_any_number_of_ranks_show_the_same_images_together(
    make_loader, numbered_split, order
):
    options = {"shuffle": True, "order": order, "seed": 2}
    folder = numbered_split(21)
    alone = make_loader(folder, batch_size=6, loader_class=TorchvisionLoader, **options)
    shared = [
        make_loader(folder, batch_size=3, rank=rank, world=2, loader_class=loader_class, **options)
        for rank, loader_class in enumerate((DaliLoader, TorchvisionLoader))
    ]
    for _ in range(2):
        for whole, *parts in zip(alone, *shared, strict=True):
            assert torch.equal(torch.cat([shown_by(part) for part in parts], dim=1), shown_by(whole))
            assert torch.equal(torch.cat([part.valid for part in parts]), whole.valid)


@pytest.mark.parametrize("order", [Views(3), ClassPairs()])
def test_each_view_is_augmented_for_itself(make_loader, make_split, as_source, order):
    """Every image is the same picture, so that a pair differs by its augmentation alone."""
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3))
    images = as_source(make_split([picture] * 11))
    for batch in make_loader(images, order=order, **AUGMENTED):
        assert len({row.numpy().tobytes() for row in batch.images}) == len(batch.images)


@pytest.mark.parametrize("loader_class", ["torchvision"], indirect=True)
@pytest.mark.parametrize("order", [Views(2), Rotations(4), ClassPairs()])
def test_torchvision_s_first_view_is_what_one_view_would_be(make_loader, noise_split, as_source, order):
    images = as_source(noise_split)
    several, single = (list(make_loader(images, **AUGMENTED, **more)) for more in ({"order": order}, {}))
    for batch, reference in zip(several, single, strict=True):
        assert torch.equal(views_of(batch)[0], reference.images)
        assert torch.equal(batch.index, reference.index)


@pytest.mark.parametrize("channels_last", [True, False])
def test_rotations_are_quarter_turns_of_one_augmentation_counter_clockwise(
    make_loader, noise_split, channels_last
):
    options = {**AUGMENTED, "preprocessing": AUGMENTED["preprocessing"] | {"channels_last": channels_last}}
    loader = make_loader(noise_split, order=Rotations(4), **options)
    single = list(make_loader(noise_split, **options))
    batches = list(loader)
    assert_same_images([batch._replace(views=1) for batch in batches], single)
    for batch, reference in zip(batches, single, strict=True):
        assert batch.images.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert torch.equal(views_of(batch)[0], reference.images)
        for view, degrees in zip(views_of(batch), (0, 90, 180, 270), strict=True):
            for turned, plane in zip(view.flatten(0, 1), reference.images.flatten(0, 1), strict=True):
                assert np.array_equal(np.asarray(Image.fromarray(plane.numpy()).rotate(degrees)), turned)


def test_fewer_rotations_are_the_first_ones(make_loader, noise_split):
    two, four = (list(make_loader(noise_split, order=Rotations(count), **AUGMENTED)) for count in (2, 4))
    for batch, reference in zip(two, four, strict=True):
        assert torch.equal(views_of(batch), views_of(reference)[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
@pytest.mark.parametrize("order", [Views(2), Rotations(4), ClassPairs()])
def test_views_reach_the_gpu(make_loader, make_split, decode, order):
    grey = [np.full((32, 32), i) for i in range(9)]
    loader = make_loader(
        make_split(grey), size=32, order=order, shuffle=True, decode=decode, device=torch.device("cuda")
    )
    for batch in loader:
        assert all(field.is_cuda for field in batch[:4])
        assert torch.equal(shown_by(batch)[0], batch.index)
        assert torch.equal(shown_by(batch)[1] % 3, batch.labels)
