"""Accuracy on the evaluation split, over all ranks, padding excluded."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from kdav_fast.config import Config, DataConfig, apply_overrides, flat, known_keys, parse_config
from kdav_fast.data import Loader, build_evaluation_loader, check_images, open_evaluation_images
from kdav_fast.errors import InputError
from kdav_fast.student_file import read_student
from kdav_fast.train.distributed import Cluster, start_cluster
from kdav_fast.train.meter import correct_counts
from kdav_fast.train.precision import autocast, autocast_dtype, check_image_dtype

EFFECTIVE = frozenset(
    {"device", "train.batch_size", "train.precision"}
    | {f"data.{key}" for key in ("name", "root", "download", "val_labels", "skip_list", "max_pixels")}
    | {f"data.{key}" for key in ("loader", "decode", "hw_decoder_load", "workers", "dtype", "layout")}
    | {
        f"data.{key}" for key in ("image_size", "eval_resize", "crop")
    }  # the default of eval_resize follows crop
)
"""The config keys that an evaluation heeds; the others say how a run trains."""


class Accuracy(NamedTuple):
    """What an evaluation finds."""

    top1: float
    """Percent of images whose class has the highest score."""
    top5: float
    """Percent of images whose class is among the five highest."""
    loss: float
    """Mean cross-entropy of the scores, in nats."""
    images: int

    def logged(self) -> dict[str, float]:
        """Under the keys of the run's log."""
        return {f"val/{name}": value for name, value in self._asdict().items()}

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f}, {self.images} images"


@torch.no_grad()
def evaluate(network: nn.Module, loader: Loader, cluster: Cluster, dtype: torch.dtype | None) -> Accuracy:
    """Evaluate a network that returns `Outputs` on every image of `loader` once.

    Args:
        network: left in the mode it came in.
        loader: an evaluation split, at the start of an epoch.
        cluster: the run's processes; every rank gets the same answer.
        dtype: autocast dtype; None for float32.
    """
    was_training = network.training
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=cluster.device)
    batches = tqdm(
        loader, "evaluate", loader.steps_per_epoch, leave=False, disable=None if cluster.is_first else True
    )
    for batch in batches:
        with autocast(cluster.device, dtype):
            logits = network(batch.images).logits.float()
        top1, top5 = correct_counts(logits, batch.target, batch.valid)
        losses = F.cross_entropy(logits, batch.target, reduction="none") * batch.valid
        sums += torch.stack([top1, top5, losses.sum(), batch.valid.sum()]).double()
    network.train(was_training)
    top1, top5, loss, images = cluster.sum(sums).tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))


def evaluation_config(data: DataConfig, overrides: list[str]) -> Config:
    """The config of an evaluation: the data of the training, and what `overrides` change.

    Raises:
        InputError: a key or value is not in the schema, or a key has no effect on an evaluation.
    """
    # Whatever the images were in training: the machine here may not compute in halves.
    raw = {"data": data.model_dump(mode="json") | {"dtype": "fp32"}}
    given: dict[str, Any] = {}
    apply_overrides(given, overrides)
    for key in flat(given):
        if key in known_keys() and key not in EFFECTIVE:
            why = "; weights go with the mean and std of their file" * (key in ("data.mean", "data.std"))
            raise InputError(
                f"{key} has no effect on an evaluation{why}; these have: {', '.join(sorted(EFFECTIVE))}"
            )
    apply_overrides(raw, overrides)
    return parse_config(raw)


def evaluate_file(path: Path, overrides: list[str] = ()) -> Accuracy:
    """Evaluate a run, a checkpoint or an exported student on the data it was trained with, or on other data.

    Args:
        path: as for `find_student_file`.
        overrides: config keys, such as `data.root=FOLDER`, `device=cpu` or `train.batch_size=512`.

    Raises:
        InputError: a file or folder cannot be used, or the data has other classes than the student.
    """
    student, card = read_student(path)
    config = evaluation_config(card.data, overrides)
    cluster = start_cluster(config.device)
    dtype = autocast_dtype(config.train.precision, cluster.device)
    check_image_dtype(config.data.dtype, dtype)
    images = open_evaluation_images(config.data, card.classes)
    if images.classes != card.classes:
        raise InputError(
            f"{images.root / images.split} has {len(images.classes)} classes ({_some(images.classes)}), but "
            f"{path} knows {len(card.classes)} ({_some(card.classes)}); give the data set it was trained for"
        )
    check_images(images, config.data.max_pixels)
    loader = build_evaluation_loader(
        config.data,
        images,
        batch_size=config.train.batch_size,
        device=cluster.device,
        normalization=card.normalization,
    )
    student = student.to(cluster.device, memory_format=torch.channels_last)
    return evaluate(student, loader, cluster, dtype)


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
