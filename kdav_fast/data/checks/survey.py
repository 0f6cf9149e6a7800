"""Look through a whole data set and list everything that would stop or mislead a training run."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kdav_fast.config import DataConfig, apply_overrides, parse_sections
from kdav_fast.data.checks.class_tree import ClassTree, Remark, compare_classes, walk_classes
from kdav_fast.data.checks.defects import examine
from kdav_fast.data.checks.scan import DECODING_CHUNK, clean_record, remember_clean, scan
from kdav_fast.data.image_set import EncodedImages, printable
from kdav_fast.data.sources import open_images
from kdav_fast.data.sources.folder import ImageFolder, index_folder, open_evaluation_folder
from kdav_fast.data.sources.skip_list import leave_out, write_skip_list
from kdav_fast.errors import InputError
from kdav_fast.runtime.progress_bar import ProgressBar

_EVALUATION = ("val", "test")
_READERS = 16  # threads that mostly wait for the file system


@dataclass
class Survey:
    """What was found."""

    images: dict[str, int] = field(default_factory=dict)
    """How many were examined in each split."""
    classes: int = 0
    problems: list[Remark] = field(default_factory=list)
    notes: list[Remark] = field(default_factory=list)
    """What training gets along with."""
    defects: list[tuple[str, str]] = field(default_factory=list)
    """Name and defect of every image that `data.skip_list` can leave out; they are `problems` as well."""
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Notes and problems, one line each: `PATH: problem`."""
        notes = [f"{printable(path)}: note: {text}" for path, text in self.notes]
        return notes + [f"{printable(path)}: {text}" for path, text in self.problems]

    def summary(self) -> str:
        """One line: images, classes, splits, seconds."""
        splits = ", ".join(f"{split} {count:,}" for split, count in self.images.items())
        return (
            f"{sum(self.images.values()):,} images ({splits}), {self.classes:,} classes, {self.seconds:.1f} s"
        )

    def require_no_problems(self, folder: Path, quarantine: Path | None) -> None:
        """Raise an `InputError` that counts the problems, if there are any."""
        if not self.problems:
            return
        remedy = "mend them"
        if quarantine and self.defects:
            remedy = f"data.skip_list={quarantine} leaves {len(self.defects):,} of them out"
        elif self.defects:
            remedy = f"mend them, or leave {len(self.defects):,} of them out by --quarantine FILE and data.skip_list"
        count = f"{len(self.problems):,} problem{'s' * (len(self.problems) != 1)}"
        raise InputError(f"{count} in {folder}: {self.summary()}; {remedy}")

    def write_quarantine(self, path: Path) -> None:
        """Write the defective images for `data.skip_list`; raises `InputError` if the file cannot be written."""
        write_skip_list(path, self.defects)

    def as_json(self) -> dict[str, Any]:
        """The whole as JSON values."""
        return {
            "images": self.images,
            "classes": self.classes,
            "seconds": round(self.seconds, 3),
            "problems": [{"path": printable(path), "problem": text} for path, text in self.problems],
            "notes": [{"path": printable(path), "note": text} for path, text in self.notes],
        }


def config_of(folder: Path, overrides: list[str]) -> DataConfig:
    """The data section for a folder; `data.name` follows from what is in it, unless it is given.

    Args:
        folder: `data.root`.
        overrides: `key=value`, any that a run would get.

    Raises:
        InputError: a key or value is not in the schema.
    """
    folder = folder.expanduser()
    raw = {"data": {"name": "webdataset" if _holds_shards(folder) else "folder", "root": str(folder)}}
    apply_overrides(raw, overrides)
    config = parse_sections(raw).data
    if config.root != folder:
        raise InputError(f"data.root is {config.root} but FOLDER is {folder}; drop the override data.root")
    return config


def survey(
    config: DataConfig, decode: bool = False, workers: int | None = None, progress: bool = True
) -> Survey:
    """Examine every image of the splits that a run would use, and the folders around them.

    In trees of class folders all problems are found; other layouts must open as they do for a run. A tree
    may lack `train/`, or `val/` and `test/`: what there is is examined. A `root` with none of them is itself
    taken for a split, so that its images are called as they would be with its parent folder as `data.root`.

    Args:
        config: the data section; `train_subset` has no effect.
        decode: decode all pixels. Otherwise a few KiB are read of each file.
        workers: threads. Default: as many as cores to decode, else 16.
        progress: show a bar on stderr.

    Raises:
        InputError: the data set cannot be opened at all.
    """
    begin = time.monotonic()
    result = Survey()
    if config.name == "folder":
        splits = _open_trees(config, result)
    else:
        splits = open_images(config.model_copy(update={"train_subset": None, "skip_list": None}), seed=0)
    splits = leave_out(config.skip_list, *(images for images in splits if len(images)))
    result.images = {images.split: len(images) for images in splits}
    result.classes = len({name for images in splits for name in images.classes})
    workers = workers or (len(os.sched_getaffinity(0)) if decode else _READERS)
    look = partial(examine, max_pixels=config.max_pixels, decode=decode)
    with ProgressBar(
        total=sum(map(len, splits)),
        desc="decoding" if decode else "checking",
        unit="image",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        for images in splits:
            if isinstance(images, EncodedImages):
                _examine_images(images, look, result, bar, workers, decode)
    result.seconds = time.monotonic() - begin
    return result


def _examine_images(
    images: EncodedImages, look: partial, result: Survey, bar: ProgressBar, workers: int, decode: bool
) -> None:
    chunk = {"chunk": DECODING_CHUNK} if decode else {}
    record = clean_record(images, look.keywords["max_pixels"], decode, workers)
    found = list(scan(images, partial(look, images), workers, bar, **chunk))
    if not any(finding.defect for finding in found):
        remember_clean(record, images)  # a run need not look again
    for position, finding in enumerate(found):
        name = images.name(position)
        if finding.defect:
            result.problems.append(Remark(name, finding.defect))
            if not set(name) & {"\t", "\n"}:
                result.defects.append((name, finding.defect))
        elif finding.foreign:
            result.notes.append(Remark(name, f"is a {finding.foreign}, and is decoded as such"))


def _open_trees(config: DataConfig, result: Survey) -> list[ImageFolder]:
    """The splits of a tree of class folders; what is wrong with the tree goes to `result`."""
    root, splits = _splits(config.root)
    trees: list[ClassTree] = []
    for split in splits:
        if split in _EVALUATION and root == config.root:
            classes = trees[0].images.classes if trees else None
            strictly = partial(open_evaluation_folder, root, classes, config.val_labels)
        else:
            strictly = partial(index_folder, root, split)
        trees.append(_open_tree(root, split, strictly))
    for tree in trees:
        result.problems += tree.problems
        result.notes += tree.notes
    images = [tree.images for tree in trees]
    if len(images) == 2:
        result.problems += compare_classes(*images)
    return images


def _open_tree(root: Path, split: str, strictly: Callable[[], ImageFolder]) -> ClassTree:
    refusal = None
    try:
        images = strictly()
        if not all(
            images.paths[i].split("/")[1] == images.classes[images.labels[i]] for i in range(len(images))
        ):
            return ClassTree(images)  # a list names the classes: there are no class folders to go through
    except InputError as error:
        refusal = str(error)
    tree = walk_classes(root, split)
    if refusal and not tree.problems:
        tree.problems.append(Remark(split, refusal))
    return tree


def _splits(folder: Path) -> tuple[Path, list[str]]:
    """The root of a data set and the splits of it that a run would use."""
    if not folder.is_dir():
        raise InputError(
            f"data.root {folder} is not a folder; give the folder that holds train/ and val/ or test/"
        )
    evaluation = [split for split in _EVALUATION if (folder / split).is_dir()][:1]
    splits = ["train"] * (folder / "train").is_dir() + evaluation
    if splits:
        return folder, splits
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link, and change the name
    return folder.parent, [folder.name]


def _holds_shards(folder: Path) -> bool:
    """Tar files, in the folder or its splits. Archives beside a tree of class folders are not meant."""
    splits = [folder / split for split in ("train", *_EVALUATION)]
    if any(entry.is_dir() for split in splits for entry in split.glob("*")):
        return False
    return any(any(place.glob("*.tar")) for place in (folder, *splits, folder / "validation"))
