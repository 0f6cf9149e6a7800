"""CIFAR-10 and CIFAR-100 as published: pickles for Python, and a binary version."""

import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from kdav_fast.data.sources.archive_files import DamagedError, Files, Layout, text_lines
from kdav_fast.data.sources.plain_pickle import load_plain

_PLANES = (3, 32, 32)
_BYTES = 3 * 32 * 32


def _as_images(rows: Sequence[np.ndarray]) -> np.ndarray:
    """N x 32 x 32 x 3 from the rows of some files, each row the red, the green and the blue plane."""
    return np.ascontiguousarray(np.concatenate(rows).reshape(-1, *_PLANES).transpose(0, 2, 3, 1))


def _read_dictionary(content: bytes, name: str) -> dict[str, Any]:
    try:
        values = load_plain(content)
    except pickle.UnpicklingError as error:
        raise DamagedError(f"{name} is no pickle of plain values ({error})") from None
    if not isinstance(values, dict):
        raise DamagedError(f"{name} holds no dictionary")
    # Keys are bytes in what Python 2 wrote.
    return {_text(key): value for key, value in values.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _read_pickled_names(content: bytes, key: str) -> list[str]:
    names = _read_dictionary(content, "the list of class names").get(key)
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DamagedError(f"the list of class names holds no list '{key}' of texts")
    return [_text(name) for name in names]


def _read_pickled_images(files: Files, names: tuple[str, ...], key: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = [], []
    for name in names:
        batch = _read_dictionary(files[name], name)
        rows, ids = batch.get("data"), _integers(batch.get(key))
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (_BYTES,):
            raise DamagedError(f"{name} holds no array 'data' of N x {_BYTES} bytes")
        if ids is None or len(ids) != len(rows):
            raise DamagedError(f"{name} holds no list '{key}' of {len(rows)} integers, one for each image")
        pixels.append(rows)
        labels.append(ids)
    return _as_images(pixels), np.concatenate(labels)


def _integers(values: Any) -> np.ndarray | None:
    if not isinstance(values, list | np.ndarray):
        return None
    try:
        found = np.array(values, dtype=None if len(values) else np.int64)
        return found.astype(np.int64, casting="same_kind", copy=False).reshape(len(values))
    except (TypeError, ValueError):  # other things than integers; nested
        return None


def _read_binary_images(
    files: Files, names: tuple[str, ...], label_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Records of the labels, the last of which counts, and the planes."""
    size = label_bytes + _BYTES
    for name in names:
        if len(files[name]) % size:
            raise DamagedError(f"{name} has {len(files[name]):,} bytes, which is no multiple of {size:,}")
    records = [np.frombuffer(files[name], np.uint8).reshape(-1, size) for name in names]
    pixels = _as_images([each[:, label_bytes:] for each in records])
    return pixels, np.concatenate([each[:, label_bytes - 1] for each in records])


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

CIFAR10 = (
    Layout(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        names="batches.meta",
        splits={"train": _BATCHES, "test": ("test_batch",)},
        read_names=partial(_read_pickled_names, key="label_names"),
        read_images=partial(_read_pickled_images, key="labels"),
    ),
    Layout(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        names="batches.meta.txt",
        splits={"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        read_names=text_lines,
        read_images=partial(_read_binary_images, label_bytes=1),
    ),
)

CIFAR100 = (
    Layout(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        names="meta",
        splits={"train": ("train",), "test": ("test",)},
        read_names=partial(_read_pickled_names, key="fine_label_names"),
        read_images=partial(_read_pickled_images, key="fine_labels"),
    ),
    Layout(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        names="fine_label_names.txt",
        splits={"train": ("train.bin",), "test": ("test.bin",)},
        read_names=text_lines,
        read_images=partial(_read_binary_images, label_bytes=2),
    ),
)
