"""Pickles of arrays and plain values from files that nobody vouches for."""

import io
import pickle
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric

from kdav_fast.errors import named


def load_plain(content: bytes) -> Any:
    """Numbers, texts, lists, tuples, dictionaries and NumPy arrays of numbers; Python 2's texts come as bytes.

    Raises:
        pickle.UnpicklingError: it asks for anything else, or is no pickle.
    """
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # bytes at random can raise anything
        raise pickle.UnpicklingError(named(error)) from None


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into an old protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("it encodes a text")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How Python 3 writes b"" into an old protocol."""
    return b""


_CALLABLE = {
    ("_codecs", "encode"): _encode_latin1,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): multiarray._reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): numeric._frombuffer for core in ("core", "_core")},
}
"""All that a pickle may call. None of it reads files, imports or runs what it is given."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CALLABLE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _CALLABLE[module, name]
