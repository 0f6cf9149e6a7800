import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdav_fast.data.dali import DaliLoader
from kdav_fast.data.image_set import ImageSet
from kdav_fast.data.preprocessing import CenterCrop, Preprocessing
from kdav_fast.data.resident import ResidentImages
from kdav_fast.data.sources.folder import ImageFolder
from kdav_fast.data.sources.tar_shards import open_shards
from kdav_fast.data.torchvision_loader import TorchvisionLoader

BLACK_TO_WHITE = {"flip": False, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


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
        return ImageFolder(tmp_path, split, ("a", "b", "c"), np.arange(len(images)) % 3, paths)

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
    """A loader of 8 x 8 images in 0..1, one worker, CPU, unless told otherwise; `preprocessing`: fields."""

    def make(images, loader_class=loader_class, size=8, crop=None, preprocessing=None, **options):
        fields = BLACK_TO_WHITE | (preprocessing or {})
        defaults = {"batch_size": 4, "device": torch.device("cpu"), "workers": 1, "shuffle": False}
        return loader_class(
            images, Preprocessing(size, crop or CenterCrop(size), **fields), **(defaults | options)
        )

    return make


@pytest.fixture(params=["folder", "tar", "resident"])
def as_source(request, tmp_path):
    """Turns an ImageFolder into the same images from another kind of source."""

    def in_shards(folder: ImageFolder) -> ImageSet:
        root = tmp_path / "shards"
        root.mkdir(exist_ok=True)
        for split in ("train", "val"):
            for shard, positions in enumerate(np.array_split(np.arange(len(folder)), min(3, len(folder)))):
                with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                    for position in positions:
                        image = folder.read(position).tobytes()
                        label = str(folder.labels[position]).encode()
                        for suffix, content in (
                            (Path(folder.paths[position]).suffix, image),
                            (".cls", label),
                        ):
                            member = tarfile.TarInfo(f"{position:04d}{suffix}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
        return open_shards(root)[0]

    def in_memory(folder: ImageFolder) -> ImageSet:
        pixels = [
            np.asarray(Image.open(io.BytesIO(folder.read(i))).convert("RGB")) for i in range(len(folder))
        ]
        stacked = torch.from_numpy(np.stack(pixels))
        return ResidentImages(folder.root, folder.split, folder.classes, folder.labels, stacked, folder)

    return {"folder": lambda folder: folder, "tar": in_shards, "resident": in_memory}[request.param]


@pytest.fixture
def through_json():
    return lambda state: json.loads(json.dumps(state))


@pytest.fixture
def noise_split(make_split):
    """Eleven images of noise, so that no two crops are alike."""
    return make_split(np.random.default_rng(0).integers(0, 256, (11, 12, 12, 3)))
