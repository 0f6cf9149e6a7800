"""Training metrics, summed on the device and read back once a logging interval."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdav_fast.data.batch import Batch
from kdav_fast.models.outputs import best_classes
from kdav_fast.runtime.processes import Cluster


def correct_counts(logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How many valid rows have their class first, and among the first five; a row that is not finite has neither."""
    hits = (best_classes(logits) == target[:, None]) & valid[:, None]
    return hits[:, 0].sum(), hits.sum()


class TrainMeter:
    """Means over the images of a logging interval, over all ranks, and where the time went."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._sums: dict[str, Tensor] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start timing anew: evaluation and saving are not training time."""
        self._started = time.perf_counter()
        self._waited = 0.0
        self._timed_images: Tensor | float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around each phase of a step; of "data", the time counts as waited."""
        started = time.perf_counter()
        yield
        if name == "data":
            self._waited += time.perf_counter() - started

    def update(self, logits: Tensor, batch: Batch, loss: Tensor, parts: dict[str, Tensor]) -> None:
        """Add one batch; asks nothing of the device that it would have to be waited for.

        Args:
            logits: the student's, V*B x K.
            batch: what is known of the images.
            loss: scalar, a mean over valid rows.
            parts: the same of the loss, by name.
        """
        images = batch.valid.sum()
        # Of other views, turned images say, the student need know nothing.
        top1, top5 = correct_counts(logits[: len(batch.labels)], batch.foremost, batch.valid)
        values = {"loss": loss.detach()} | {f"loss/{name}": part for name, part in parts.items()}
        sums = {name: value.double() * images for name, value in values.items()}
        sums |= {"top1": 100.0 * top1, "top5": 100.0 * top5, "images": images}
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._timed_images = self._timed_images + images

    def read(self) -> dict[str, float]:
        """The interval's metrics under their logged keys, `train/loss` and `train/loss/PART` among them.

        Starts the next interval.

        Of an interval without any `update`, which is one whose steps were all skipped, only how fast it went.
        """
        names = list(self._sums)
        timed_images = torch.as_tensor(self._timed_images, dtype=torch.float64, device=self._cluster.device)
        totals = torch.stack([*self._sums.values(), timed_images])
        *sums, timed_images = self._cluster.sum(totals).tolist()
        seconds = time.perf_counter() - self._started
        sums = dict(zip(names, sums, strict=True))
        images = max(1.0, sums.pop("images", 0.0))
        values = {f"train/{name}": value / images for name, value in sums.items()}
        values["images_per_second"] = timed_images / seconds
        values["data_wait_share"] = self._waited / seconds
        self._sums = {}
        self.restart_clock()
        return values
