"""The contract of `Loader`, for both implementations and every kind of source."""

from dataclasses import replace
from itertools import chain, repeat

import numpy as np
import psutil
import pytest
import torch

from kdav_fast.data.dali import DaliLoader
from kdav_fast.data.preprocessing import (
    CenterCrop,
    PaddedCrop,
    RandomResizedCrop,
)
from kdav_fast.data.resident import decode_once
from kdav_fast.data.sources.folder import ImageFolder
from kdav_fast.data.torchvision_loader import TorchvisionLoader
from kdav_fast.errors import InputError, RankLostError
from tests.data.batches import AUGMENTED, EVERYTHING, assert_equal, assert_same_images, order_of


def test_batches_have_the_promised_form(make_loader, numbered_split, as_source):
    folder = numbered_split(10)
    loader = make_loader(as_source(folder))
    assert (loader.batches_per_epoch, loader.images_per_epoch) == (3, 10)
    batches = list(loader)
    assert len(batches) == 3
    for batch in batches:
        assert batch.images.shape == (4, 3, 8, 8)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert batch.valid.dtype == torch.bool
        assert batch.labels.shape == batch.index.shape == batch.valid.shape == (4,)
        # The grey value of image i is i: an index names the pixels and the label it came with.
        torch.testing.assert_close(batch.images, (batch.index / 255).view(4, 1, 1, 1).expand(4, 3, 8, 8))
        assert batch.labels.tolist() == folder.labels[batch.index].tolist()
    assert order_of(batches) == list(range(10))
    assert batches[-1].valid.tolist() == [True, True, False, False]
    assert all(batch.mixed is None and batch.views == 1 for batch in batches)


def test_normalisation(loader_class, make_loader, numbered_split):
    plain = make_loader(numbered_split(4))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    loader = make_loader(numbered_split(4))
    loader.preprocessing = replace(loader.preprocessing, mean=mean, std=std)
    (raw,), (normalised,) = plain, loader
    expected = (raw.images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalised.images, expected)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "world"), [(7, 1), (8, 2), (7, 2), (10, 3), (13, 3), (2, 3)])
def test_ranks_together_see_every_image_once(make_loader, numbered_split, count, world, shuffle):
    assert_every_image_once(make_loader, numbered_split(count), world, shuffle)


@pytest.mark.parametrize("shuffle", [False, True])
def test_so_they_do_from_every_source(make_loader, numbered_split, as_source, shuffle):
    assert_every_image_once(make_loader, as_source(numbered_split(13)), 3, shuffle)


def assert_every_image_once(make_loader, folder, world, shuffle):
    loaders = [make_loader(folder, rank=rank, world=world, shuffle=shuffle) for rank in range(world)]
    for _ in range(2):
        epochs = [list(loader) for loader in loaders]
        assert {len(batches) for batches in epochs} == {loaders[0].batches_per_epoch}
        assert sorted(order_of(chain.from_iterable(epochs))) == list(range(len(folder)))


@pytest.mark.parametrize("world", [1, 2])
def test_training_fills_up_with_other_images_anywhere(make_loader, numbered_split, world):
    """21 images in steps of 16: 11 rows too many, all different images and not all in the last step."""
    loaders = [
        make_loader(numbered_split(21), batch_size=16 // world, rank=rank, world=world, shuffle=True)
        for rank in range(world)
    ]
    repeated_in = set()
    for _ in range(4):
        epochs = [list(loader) for loader in loaders]
        repeated = [int(i) for batches in epochs for batch in batches for i in batch.index[~batch.valid]]
        assert len(repeated) == len(set(repeated)) == 11
        for batches in epochs:
            repeated_in |= {step for step, batch in enumerate(batches) if not batch.valid.all()}
            for batch in batches:
                pixels = (batch.index / 255).view(-1, 1, 1, 1).expand_as(batch.images)
                torch.testing.assert_close(batch.images, pixels)
    assert repeated_in == {0, 1}


def test_a_rank_may_end_on_a_batch_of_padding(make_loader, numbered_split):
    batches = list(make_loader(numbered_split(5), batch_size=2, rank=1, world=2))
    assert [batch.valid.tolist() for batch in batches] == [[True, True], [False, False]]


def test_an_iterator_ends_when_a_newer_one_begins(make_loader, numbered_split):
    """Else it would give images of the newer one's epoch with labels of its own."""
    loader = make_loader(numbered_split(40), batch_size=8)
    older = iter(loader)
    next(older)
    newer = iter(loader)
    second = next(newer)
    with pytest.raises(RuntimeError, match="use one iterator at a time"):
        next(older)
    rest = list(newer)
    seen = torch.cat([batch.index for batch in (second, *rest)])
    assert len(seen.unique()) == 32


def test_unshuffled_order_is_the_same_every_epoch(make_loader, numbered_split):
    loader = make_loader(numbered_split(6))
    assert order_of(loader) == order_of(loader) == list(range(6))


def test_order_depends_on_seed_and_epoch(make_loader, numbered_split):
    folder = numbered_split(30)

    def epochs(seed):
        loader = make_loader(folder, shuffle=True, seed=seed)
        return [order_of(loader) for _ in range(3)]

    first = epochs(0)
    assert len(set(map(tuple, [*first, *epochs(1), list(range(30))]))) == 7
    assert epochs(0) == first


def test_both_loaders_take_the_same_images_together(make_loader, numbered_split):
    loaders = [
        make_loader(numbered_split(21), loader_class=loader_class, shuffle=True, seed=2, rank=1, world=2)
        for loader_class in (DaliLoader, TorchvisionLoader)
    ]
    for _ in range(2):
        dali, reference = (list(loader) for loader in loaders)
        assert_same_images(dali, reference)


def test_images_stay_valid_after_later_batches_and_the_loader_are_gone(make_loader, noise_split, as_source):
    loader = make_loader(as_source(noise_split), **AUGMENTED)
    kept, copies = [], []
    for _ in range(2):
        for batch in loader:
            kept.append(batch)
            copies.append(batch._replace(images=batch.images.clone(), index=batch.index.clone()))
    del loader, batch
    assert_equal(kept, copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_memory_order(make_loader, noise_split, as_source, dtype, channels_last):
    preprocessing = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    images = as_source(noise_split)
    plain = list(make_loader(images, preprocessing=preprocessing))
    other = list(
        make_loader(images, preprocessing=preprocessing | {"dtype": dtype, "channels_last": channels_last})
    )
    for batch, reference in zip(other, plain, strict=True):
        assert batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert batch.images.is_contiguous() != channels_last
        # Equal but for the last bit, where float32 itself was rounded in another order.
        torch.testing.assert_close(
            batch.images.float(), reference.images, rtol=torch.finfo(dtype).eps, atol=1e-6
        )


@pytest.mark.parametrize("damage", ["empty", "text", "truncated PNG", "truncated JPEG", "missing"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_corrupt_image_is_named(make_loader, make_split, shuffle, damage):
    folder = make_split(
        np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)), suffix="jpg" if "JPEG" in damage else "png"
    )
    victim = folder.root / folder.paths[6]
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"empty": b"", "text": b"hello"}.get(damage, content[: len(content) // 2]))
    loader = make_loader(folder, batch_size=2, shuffle=shuffle, crop=RandomResizedCrop((0.5, 1), (1, 1)))
    seen = []
    with pytest.raises(InputError, match=r"1 of 9 images in .* cannot be used: train/0006\.\w+ \(") as error:
        seen += loader
    assert "\n" not in str(error.value)
    del error  # it refers to this frame, which would keep the loader's workers until a garbage collection
    # Once it is repaired, the same loader goes on.
    victim.write_bytes(content)
    seen += loader
    assert sorted(order_of(seen)) == list(range(9))


@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
def test_the_end_of_the_process_that_reads_ends_the_run_in_one_line(make_loader, numbered_split):
    loader = make_loader(numbered_split(40), batch_size=2)
    batches = iter(loader)
    next(batches)
    for child in psutil.Process().children():
        child.kill()
    with pytest.raises(RankLostError, match="which reads image files, was ended by SIGKILL") as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_nothing_is_opened_before_the_first_batch(make_loader, tmp_path):
    paths = ("train/missing.png",) * 3
    loader = make_loader(ImageFolder(tmp_path, "train", ("a",), np.zeros(3, np.int64), paths))
    assert loader.state_dict()["step"] == 0


def test_ranks_augment_differently(make_loader, make_split):
    """Both ranks' shards hold copies of one image."""
    folder = make_split(np.tile(np.random.default_rng(0).integers(0, 256, (12, 12, 3)), (4, 1, 1, 1)))
    one, other = (
        next(iter(make_loader(folder, batch_size=2, rank=rank, world=2, **AUGMENTED))) for rank in (0, 1)
    )
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.images[0], one.images[1])


@pytest.mark.parametrize("loader_class", ["torchvision"], indirect=True)
def test_torchvision_augments_alike_with_any_number_of_workers(make_loader, noise_split):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert_equal(
        list(make_loader(noise_split, workers=1, **AUGMENTED)),
        list(make_loader(noise_split, workers=2, **AUGMENTED)),
    )
    assert torch.equal(torch.get_rng_state(), before)


CUDA = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "crop", [RandomResizedCrop((0.3, 1.0), (0.75, 4 / 3)), PaddedCrop(4), CenterCrop(40)]
)
def test_batches_reach_the_gpu(loader_class, make_loader, smooth_split, decode, crop):
    options = {"decode": decode} if loader_class is DaliLoader else {}
    here = list(make_loader(smooth_split, size=32, crop=crop))
    there = list(make_loader(smooth_split, size=32, crop=crop, device=CUDA, **options))
    for batch, reference in zip(there, here, strict=True):
        assert all(field.is_cuda for field in batch[:4])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.index.cpu(), reference.index)
        if isinstance(crop, CenterCrop):
            torch.testing.assert_close(batch.images.cpu(), reference.images, rtol=0, atol=4 / 255)


@pytest.fixture
def smooth_split(make_split):
    """Six JPEG files of 48 x 64 pixels."""
    coarse = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse, (48, 64), mode="bicubic").clamp(0, 1) * 255
    return make_split(pixels.permute(0, 2, 3, 1).numpy(), suffix="jpg")


@pytest.mark.gpu
@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["cpu", "gpu", "resident"])
def test_everything_random_is_restored_on_the_gpu(make_loader, smooth_split, through_json, place, dtype):
    options = {
        **AUGMENTED,
        "device": CUDA,
        "batch_size": 2,
        "preprocessing": EVERYTHING | {"dtype": dtype},
        "size": 32,
    }
    if place == "resident":
        decoder = make_loader(smooth_split, size=32, device=CUDA, preprocessing={"dtype": torch.uint8})
        smooth_split = decode_once(decoder, CUDA, 1, progress=False)
        assert smooth_split.pixels.is_cuda
    else:
        options |= {"decode": place, "hw_decoder_load": 0.5, "fancy_upsampling": False}
    loader = make_loader(smooth_split, **options)
    next(iter(loader))
    restored = make_loader(smooth_split, **options)
    restored.load_state_dict(through_json(loader.state_dict()))
    batches = [*loader, *loader]
    assert batches[0].images.dtype == dtype
    assert batches[0].images.is_cuda
    assert_equal([*restored, *restored], batches)


@pytest.mark.gpu
@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
def test_resident_pixels_on_the_gpu_are_those_on_the_cpu(make_loader, smooth_split):
    def keep(device):
        decoder = make_loader(smooth_split, size=32, preprocessing={"dtype": torch.uint8})
        return decode_once(decoder, device, 1, progress=False)

    here, there = (
        list(make_loader(keep(device), size=32, device=device)) for device in (torch.device("cpu"), CUDA)
    )
    for batch, reference in zip(there, here, strict=True):
        torch.testing.assert_close(batch.images.cpu(), reference.images, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "gpu", "resident", "torchvision"])
def test_the_host_does_not_wait_for_the_gpu(make_loader, smooth_split, place):
    """As far as torch can tell, and it reports its own copies and waits."""
    options = {**AUGMENTED, "device": CUDA, "batch_size": 2, "size": 32}
    if place == "torchvision":
        options["loader_class"] = TorchvisionLoader
    elif place == "resident":
        decoder = make_loader(
            smooth_split, DaliLoader, size=32, device=CUDA, preprocessing={"dtype": torch.uint8}
        )
        smooth_split = decode_once(decoder, CUDA, 1, progress=False)
    else:
        options["decode"] = place
    batches = chain.from_iterable(repeat(make_loader(smooth_split, **{"loader_class": DaliLoader} | options)))
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            next(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("loader_class", ["dali"], indirect=True)
@pytest.mark.parametrize("crop", [RandomResizedCrop((0.3, 1.0), (0.75, 4 / 3)), CenterCrop(40)])
def test_fancy_upsampling_is_what_the_cpu_does(make_loader, smooth_split, crop):
    """Colours between their pixels: without it, the images are others."""

    def images(device, **options):
        loader = make_loader(smooth_split, size=32, crop=crop, device=device, **options)
        return torch.cat([batch.images.cpu() for batch in loader])

    fancy, plain = (images(CUDA, decode="gpu", fancy_upsampling=wanted) for wanted in (True, False))
    assert not torch.equal(fancy, plain)
    if isinstance(crop, CenterCrop):
        torch.testing.assert_close(fancy, images(torch.device("cpu")), rtol=0, atol=4 / 255)
