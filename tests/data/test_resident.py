from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from kdav_fast.config import DataConfig
from kdav_fast.data import Splits, build_loaders
from kdav_fast.data.preprocessing import (
    CenterCrop,
    PaddedCrop,
    Preprocessing,
    RandomResizedCrop,
    pixel_preprocessing,
    resident_preprocessing,
)
from kdav_fast.data.resident import decode_once, picked_rows
from kdav_fast.errors import InputError
from tests.data.pictures import pixels_of, smooth_photograph

CPU = torch.device("cpu")


@pytest.fixture
def photographs(make_split):
    return make_split([smooth_photograph(30 + i, 50 - i, i) for i in range(9)])


@pytest.mark.parametrize("crop", [CenterCrop(20), CenterCrop(16)])
def test_the_pixels_are_those_of_the_evaluation_view(make_loader, photographs, crop):
    resident = decode_once(
        make_loader(photographs, size=16, crop=crop, preprocessing={"dtype": torch.uint8}),
        CPU,
        1,
        progress=False,
    )
    assert resident.pixels.dtype == torch.uint8
    assert resident.pixels.shape == (9, 16, 16, 3)
    expected = pixels_of(make_loader(photographs, size=16, crop=crop))
    torch.testing.assert_close(resident.pixels.permute(0, 3, 1, 2).float(), expected, rtol=0, atol=1e-3)
    assert (resident.classes, resident.split) == (photographs.classes, photographs.split)
    assert resident.labels.tolist() == photographs.labels.tolist()
    assert resident.name(4) == photographs.name(4)


def test_a_training_crop_is_left_for_later_and_an_evaluation_crop_is_done():
    plain = {"flip": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for crop in (PaddedCrop(4), RandomResizedCrop((0.5, 1), (1, 1))):
        training = Preprocessing(32, crop, **plain)
        assert pixel_preprocessing(training).crop == CenterCrop(32)
        assert resident_preprocessing(training) == training
    evaluation = Preprocessing(32, CenterCrop(40), **plain)
    assert pixel_preprocessing(evaluation).crop == CenterCrop(40)
    assert resident_preprocessing(evaluation).crop == CenterCrop(32)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_resident_batches_equal_decoded_ones(photographs, loader):
    """Nothing random: every image of every loader, in and out of memory."""
    common = {
        "image_size": 16,
        "crop": "none",
        "flip": False,
        "eval_resize": 20,
        "workers": 1,
        "loader": loader,
    }
    sets = []
    for resident in (True, False):
        sets.append(
            build_loaders(
                DataConfig(resident=resident, **common),
                Splits(photographs, photographs),
                batch_size=4,
                eval_batch_size=5,
                device=CPU,
                rank=0,
                world=1,
                local_world=1,
                seed=3,
                normalization=SimpleNamespace(mean=(0.4,) * 3, std=(0.2,) * 3),
            )
        )
    for name in ("train", "evaluation"):
        for batch, reference in zip(*(getattr(one, name) for one in sets), strict=True):
            torch.testing.assert_close(batch.images, reference.images, rtol=0, atol=1e-5)
            assert torch.equal(batch.index, reference.index)
    assert torch.equal(*(next(iter(one.measure())).images for one in sets))


def test_its_digest_is_of_the_files_so_that_a_restart_may_decode_anew(make_loader, photographs):
    def keep(images, size):
        return decode_once(
            make_loader(images, size=size, preprocessing={"dtype": torch.uint8}), CPU, 1, progress=False
        )

    assert keep(photographs, 16).digest == keep(photographs, 16).digest
    assert keep(photographs, 16).digest != keep(photographs, 8).digest
    assert keep(photographs.select(np.arange(8)), 16).digest != keep(photographs, 16).digest
    some = keep(photographs, 16).select(np.array([4, 2]))
    assert [some.name(0), some.name(1)] == [photographs.name(4), photographs.name(2)]
    assert torch.equal(some.pixels[1], keep(photographs, 16).pixels[2])


class PixelsOnAGpu:
    """Notes what it is asked for."""

    is_cuda, device = True, torch.device("cuda", 1)

    def __init__(self):
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return index


def test_rows_of_a_gpu_are_picked_without_waiting_for_it(monkeypatch):
    """A fake without a GPU: what crosses comes from pinned memory, and nobody waits for it."""
    steps = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: steps.append("pinned") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *given, **named: steps.append((given, named)) or self
    )
    pixels, batches = PixelsOnAGpu(), [np.array([3, 1]), np.array([0])]
    assert [rows.tolist() for rows in picked_rows(pixels, batches)] == [[3, 1], [0]]
    assert steps == ["pinned", ((pixels.device,), {"non_blocking": True})] * 2
    assert all(isinstance(index, torch.Tensor) for index in pixels.asked)


def test_what_does_not_fit_is_refused_before_it_is_decoded(make_loader, numbered_split, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    (split := numbered_split(4)).root.joinpath(split.paths[0]).write_bytes(b"")
    loader = make_loader(split, size=400, preprocessing={"dtype": torch.uint8})
    with pytest.raises(InputError, match=r"data\.resident needs .* GiB for the 4 train images at 400 x 400"):
        decode_once(loader, CPU, 1, progress=False)


def test_each_process_of_a_machine_needs_its_own_memory(make_loader, numbered_split, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 8 * 8 * 3 * 2))
    preprocessing = {"dtype": torch.uint8}
    decode_once(make_loader(numbered_split(4), preprocessing=preprocessing), CPU, 2, progress=False)
    with pytest.raises(InputError, match="of memory a process are free"):
        decode_once(make_loader(numbered_split(4), preprocessing=preprocessing), CPU, 3, progress=False)


def test_a_corrupt_image_is_named_while_decoding(make_loader, numbered_split):
    split = numbered_split(6)
    (split.root / split.paths[3]).write_bytes(b"")
    with pytest.raises(InputError, match=r"train/0003\.png \(empty\)"):
        decode_once(make_loader(split, preprocessing={"dtype": torch.uint8}), CPU, 1, progress=False)
