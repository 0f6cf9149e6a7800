import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdav_fast.data.dali import DaliLoader
from kdav_fast.data.folder import ImageFolder
from kdav_fast.data.preprocessing import CenterCrop, Preprocessing
from kdav_fast.data.torchvision_loader import TorchvisionLoader

BLACK_TO_WHITE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kdav_fast"


@pytest.fixture
def save_image():
    """Write pixels (H x W or H x W x 3, 0..255); the suffix gives the format."""

    def save(path: Path, pixels: np.ndarray, **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
        return path

    return save


@pytest.fixture
def make_split(tmp_path, save_image):
    """An ImageFolder of the given images; image i is of class i % 3."""

    def make(images, split="train", suffix="png") -> ImageFolder:
        paths = tuple(f"{split}/{i:04d}.{suffix}" for i in range(len(images)))
        for path, pixels in zip(paths, images, strict=True):
            save_image(tmp_path / path, pixels)
        return ImageFolder(tmp_path, split, ("a", "b", "c"), paths, np.arange(len(images)) % 3)

    return make


@pytest.fixture
def numbered_split(make_split):
    """`count` flat grey images of 8 x 8; the grey value is the position."""
    return lambda count, split="train": make_split([np.full((8, 8), i) for i in range(count)], split)


@pytest.fixture(params=["dali", "torchvision"])
def loader_class(request):
    return {"dali": DaliLoader, "torchvision": TorchvisionLoader}[request.param]


@pytest.fixture
def make_loader(loader_class):
    """A loader of 8 x 8 images in 0..1, one worker, CPU, unless told otherwise."""

    def make(folder, loader_class=loader_class, size=8, crop=None, flip=False, **options):
        preprocessing = Preprocessing(size, crop or CenterCrop(size), flip, **BLACK_TO_WHITE)
        defaults = {"batch_size": 4, "device": torch.device("cpu"), "workers": 1, "shuffle": False}
        return loader_class(folder, preprocessing, **(defaults | options))

    return make


@pytest.fixture
def through_json():
    return lambda state: json.loads(json.dumps(state))
