"""Where the images of a config come from: one opener for each `data.name`."""

from typing import NamedTuple

from kdav_fast.config import DataConfig
from kdav_fast.data.image_set import ImageSet, take_subset
from kdav_fast.data.sources.archives import open_archive, open_evaluation_archive
from kdav_fast.data.sources.digits import prepare_digits
from kdav_fast.data.sources.folder import open_evaluation_folder, open_folder
from kdav_fast.data.sources.skip_list import leave_out
from kdav_fast.data.sources.tar_shards import open_evaluation_shards, open_shards


class Splits(NamedTuple):
    """The images of a data set, indexed; files are listed but not opened."""

    train: ImageSet
    """After `data.skip_list` and `data.train_subset`."""
    evaluation: ImageSet
    """`val`, or `test` where there is no `val`; after `data.skip_list`."""


def open_images(config: DataConfig, seed: int) -> Splits:
    """Index the data set of a config. Files are listed, not checked: see `check_images`.

    Args:
        config: the data section.
        seed: of the subset.

    Raises:
        InputError: the data set is not as it must be, or too small for the subset.
    """
    match config.name:
        case "digits":
            splits = open_folder(prepare_digits(config.root))
        case "folder":
            splits = open_folder(config.root, config.val_labels)
        case "webdataset":
            splits = open_shards(config.root)
        case archive:
            splits = open_archive(archive, config.root, config.download)
    train, evaluation = leave_out(config.skip_list, *splits)
    if config.train_subset is not None:
        train = take_subset(train, config.train_subset, seed)
    return Splits(train, evaluation)


def open_evaluation_images(config: DataConfig, classes: tuple[str, ...]) -> ImageSet:
    """Index only the evaluation split; there need be no training images.

    Args:
        config: the data section.
        classes: names, for layouts whose evaluation images alone do not tell them.

    Raises:
        InputError: the data set is not as it must be.
    """
    match config.name:
        case "digits":
            evaluation = open_evaluation_folder(prepare_digits(config.root), classes)
        case "folder":
            evaluation = open_evaluation_folder(config.root, classes, config.val_labels)
        case "webdataset":
            evaluation = open_evaluation_shards(config.root, classes)
        case archive:
            evaluation = open_evaluation_archive(archive, config.root, config.download)
    return leave_out(config.skip_list, evaluation)[0]
