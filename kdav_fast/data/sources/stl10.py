"""STL-10 as published: raw bytes. The unlabelled images are not read."""

import numpy as np

from kdav_fast.data.sources.archive_files import DamagedError, Files, Layout, text_lines

_SIDE = 96
_BYTES = 3 * _SIDE * _SIDE


def _read_images(files: Files, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One file of images, each plane column by column, and one of labels, which count from 1."""
    images, labels = names
    content = np.frombuffer(files[images], np.uint8)
    if len(content) % _BYTES:
        raise DamagedError(f"{images} has {len(content):,} bytes, which is no multiple of {_BYTES:,}")
    planes = content.reshape(-1, 3, _SIDE, _SIDE)
    ids = np.frombuffer(files[labels], np.uint8).astype(np.int64) - 1
    if len(ids) != len(planes):
        raise DamagedError(f"{labels} has {len(ids):,} labels for the {len(planes):,} images of {images}")
    return np.ascontiguousarray(planes.transpose(0, 3, 2, 1)), ids


STL10 = (
    Layout(
        archive="stl10_binary.tar.gz",
        folder="stl10_binary",
        names="class_names.txt",
        splits={"train": ("train_X.bin", "train_y.bin"), "test": ("test_X.bin", "test_y.bin")},
        read_names=text_lines,
        read_images=_read_images,
    ),
)
