"""CIFAR-10, CIFAR-100 and STL-10 from the archives that their authors publish."""

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np

from kdav_fast.data.image_set import PixelImages
from kdav_fast.data.sources.archive_files import DamagedError, Files, Layout, read_files
from kdav_fast.data.sources.cifar import CIFAR10, CIFAR100
from kdav_fast.data.sources.stl10 import STL10
from kdav_fast.errors import InputError, one_line

_LAYOUTS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}


def open_archive(name: str, root: Path, download: bool) -> tuple[PixelImages, PixelImages]:
    """Read the training and the test images.

    Args:
        name: `cifar10`, `cifar100` (with the fine labels) or `stl10` (the labelled images).
        root: the archive, the folder it was extracted to, or a folder that holds either.
        download: fetch the archive into `root` where nothing is found.

    Raises:
        InputError: nothing is there, it is damaged or something else, or it cannot be fetched.
    """
    train, test = _open(name, root, download, ("train", "test"))
    return train, test


def open_evaluation_archive(name: str, root: Path, download: bool) -> PixelImages:
    """Read only the test images, otherwise as `open_archive`."""
    return _open(name, root, download, ("test",))[0]


def _open(name: str, root: Path, download: bool, splits: Sequence[str]) -> list[PixelImages]:
    layouts = _LAYOUTS[name]
    try:
        source = _find(layouts, root)
        if source is None and download:
            source = _fetch(name, root)
    except OSError as error:
        raise InputError(
            f"data.root {root} cannot be read: {error.strerror}; check its permissions"
        ) from None
    if source is None:
        raise InputError(
            f"data.root {root} holds no {name}: expected {_expected(layouts)}; put it there, or set data.download=true"
        )
    try:
        layout, files = read_files(source, layouts, splits)
        return [_images(layout, files, root, split) for split in splits]
    except DamagedError as error:
        raise InputError(
            f"{source} is not {name} as published: {error}; expected {_expected(layouts)}: remove it and fetch it anew"
        ) from None
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}; check or replace it") from None


def _images(layout: Layout, files: Files, root: Path, split: str) -> PixelImages:
    """One split, whose labels and class names fit together.

    Raises:
        DamagedError: they do not.
    """
    classes = tuple(layout.read_names(files[layout.names]))
    if not classes or len(set(classes)) < len(classes):
        raise DamagedError(f"{layout.names} names no class, or one twice")
    pixels, labels = layout.read_images(files, layout.splits[split])
    if len(labels) == 0:
        raise DamagedError(f"its {split} files hold no image")
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise DamagedError(f"a label of {split} is {wrong[0]}, but there are {len(classes)} classes")
    import torch  # imported here: it takes seconds, and most layouts need none

    return PixelImages(root, split, classes, labels.astype(np.int64), torch.from_numpy(pixels))


def _find(layouts: Sequence[Layout], root: Path) -> Path | None:
    if root.is_file() or any(
        (root / name).is_file() for layout in layouts for name in layout.wanted(("train", "test"))
    ):
        return root
    for layout in layouts:
        if (root / layout.folder).is_dir():
            return root / layout.folder
        if (root / layout.archive).is_file():
            return root / layout.archive
    return None


def _expected(layouts: Sequence[Layout]) -> str:
    return " or ".join(f"{layout.archive} (or {layout.folder}/ from it)" for layout in layouts)


def _fetch(name: str, root: Path) -> Path:
    """Download the archive into `root`, once for all processes that want it, and return its path."""
    from torchvision import datasets  # imported here: it takes a second
    from torchvision.datasets.utils import download_url

    published = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    archive = root / published.filename
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root):
            if not archive.is_file():
                # Under its name only when it is whole.
                with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as partial:
                    download_url(published.url, partial, published.filename, published.tgz_md5)
                    (Path(partial) / published.filename).replace(archive)
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"{published.url} cannot be fetched into {root}: {one_line(error)}; get it by other means "
            f"and put it there as {published.filename}"
        ) from None
    return archive


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / ".download.lock").open("w") as lock:
        # A file system without locks costs only that several processes download.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
