"""Accuracy on the evaluation split, over all ranks, padding excluded."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kdav_fast.data import Loader, build_evaluation_loader, check_images, open_evaluation_images
from kdav_fast.errors import InputError, listed
from kdav_fast.inference.trained import Trained, inference_config, open_trained, start_inference
from kdav_fast.runtime.precision import autocast
from kdav_fast.runtime.processes import Cluster
from kdav_fast.runtime.progress_bar import ProgressBar
from kdav_fast.tracking.class_results import ClassResults, ClassTally
from kdav_fast.tracking.meter import correct_counts


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
        text = f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f}, {self.images} images"
        return (
            text if math.isfinite(self.loss) else f"{text}; where scores are not finite, they count as wrong"
        )


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Loader,
    cluster: Cluster,
    dtype: torch.dtype | None,
    tally: ClassTally | None = None,
) -> Accuracy:
    """Evaluate a network that returns `Outputs` on every image of `loader` once.

    Args:
        network: left in the mode it came in.
        loader: an evaluation split, at the start of an epoch.
        cluster: the run's processes; every rank gets the same answer.
        dtype: autocast dtype; None for float32.
        tally: is shown every batch.
    """
    was_training = network.training
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=cluster.device)
    batches = ProgressBar(
        loader, "evaluate", loader.batches_per_epoch, leave=False, disable=None if cluster.is_first else True
    )
    for batch in batches:
        with autocast(cluster.device, dtype):
            logits = network(batch.images).logits.float()
        top1, top5 = correct_counts(logits, batch.labels, batch.valid)
        if tally is not None:
            tally.update(logits, batch.labels, batch.valid)
        losses = F.cross_entropy(logits, batch.labels, reduction="none") * batch.valid
        sums += torch.stack([top1, top5, losses.sum(), batch.valid.sum()]).double()
    network.train(was_training)
    top1, top5, loss, images = cluster.sum(sums).tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))


def evaluate_file(path: Path, overrides: list[str] = ()) -> Accuracy:
    """Evaluate a run, a checkpoint or an exported student on the data it was trained with, or on other data.

    Args:
        path: as for `open_trained`.
        overrides: config keys that have an effect here, such as `data.root=FOLDER` or `train.batch_size=512`.

    Raises:
        InputError: a file or folder cannot be used, or the data has other classes than the student.
    """
    return evaluate_trained(open_trained(path), overrides)[0]


def evaluate_trained(trained: Trained, overrides: list[str] = ()) -> tuple[Accuracy, ClassResults]:
    """As `evaluate_file`, and how each class did."""
    config, card = inference_config(trained, overrides), trained.card
    network, cluster, dtype = start_inference(trained, config)
    images = open_evaluation_images(config.data, card.classes)
    if images.classes != card.classes:
        raise InputError(
            f"{images.root / images.split} has {len(images.classes)} classes ({listed(images.classes, 3)}), but "
            f"{trained.file} knows {len(card.classes)} ({listed(card.classes, 3)}); "
            "give the data set it was trained for"
        )
    check_images(images, config.data.max_pixels, config.data.check == "decode")
    loader = build_evaluation_loader(
        config.data,
        images,
        batch_size=config.train.batch_size,
        device=cluster.device,
        normalization=card.normalization,
    )
    tally = ClassTally()
    accuracy = evaluate(network, loader, cluster, dtype, tally)
    return accuracy, tally.results(card.classes, cluster)
