"""scikit-learn's handwritten digits as a folder of images: a data set that needs no download."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from kdav_fast.data.cache import cache_folder
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_cached

_COUNTS = {"train": 897, "val": 900}
_CLASSES = frozenset("0123456789")


def prepare_digits(root: Path | None = None) -> Path:
    """Make sure that the digits lie below `root` and return that folder.

    1,797 grey 8 x 8 PNG files at `train/DIGIT/` (897) and `val/DIGIT/` (900), split once for all with the
    same share of each digit. Any number of processes may call this at once: every file is written whole,
    with the same content, and each process returns only when all are there.

    Args:
        root: folder to use; `None` for the package's cache folder.

    Raises:
        InputError: the folder holds other data, or cannot be written.
    """
    root = root or cache_folder() / "digits"
    try:
        _refuse_other_data(root)
        if not _is_complete(root):
            _write(root)
    except OSError as error:
        raise InputError(
            f"the digits cannot be kept in {root}: {error.strerror}; set data.root to a folder that can be written"
        ) from None
    return root


def _refuse_other_data(root: Path) -> None:
    """Never mix the digits into a folder that somebody else filled."""
    if not root.exists():
        return
    entries = [entry for entry in root.iterdir() if entry.name not in _COUNTS]
    entries += [entry for split in _COUNTS for entry in root.glob(f"{split}/*") if entry.name not in _CLASSES]
    if entries:
        raise InputError(
            f"data.root {root} for the digits holds other files ({entries[0].relative_to(root)}); "
            "give a new or empty folder, or none for the default"
        )


def _is_complete(root: Path) -> bool:
    return all(
        sum(path.stat().st_size > 0 for path in root.glob(f"{split}/*/*.png")) == count
        for split, count in _COUNTS.items()
    )


def _write(root: Path) -> None:
    # Imported here: it takes a second, and a filled cache does not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    chosen = train_test_split(
        np.arange(len(pixels)),
        train_size=_COUNTS["train"],
        test_size=_COUNTS["val"],
        stratify=digits.target,
        random_state=0,
    )
    for split, positions in zip(_COUNTS, chosen, strict=True):
        for position in positions:
            png = io.BytesIO()
            Image.fromarray(pixels[position]).save(png, "PNG")
            write_cached(root / split / str(digits.target[position]) / f"{position:04d}.png", png.getvalue())
