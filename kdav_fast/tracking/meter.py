"""Training metrics, summed on the device and read back once a logging interval."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from kdav_fast.data.batch import Batch
from kdav_fast.models.outputs import best_classes
from kdav_fast.runtime.processes import Cluster


def correct_counts(logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How many valid rows have their class first, and among the first five; a row that is not finite has neither."""
    hits = (best_classes(logits) == target[:, None]) & valid[:, None]
    return hits[:, 0].sum(), hits.sum()


_COUNTS = ("images", "top1", "top5")


class TrainMeter:
    """Means over the images of a logging interval, over all ranks, and where the time went."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._start_interval()

    def _start_interval(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._images = torch.zeros((), dtype=torch.float64, device=self._cluster.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start timing anew: evaluation and saving are not training time."""
        self._started = time.perf_counter()
        self._waited = 0.0
        self._untimed = self._images

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around each phase of a step; of "data", the time counts as waited."""
        started = time.perf_counter()
        yield
        if name == "data":
            self._waited += time.perf_counter() - started

    def update(
        self, logits: Tensor, batch: Batch, loss: Tensor, parts: dict[str, Tensor], counted: Tensor
    ) -> None:
        """Add one batch; asks nothing of the device that it would have to be waited for.

        Args:
            logits: the student's, V*B x K.
            batch: what is known of the images.
            loss: scalar, a mean over valid rows.
            parts: the same of the loss, by name.
            counted: whether its step was taken, else nothing is added: scalar, boolean, on the device.
        """
        # Of other views, turned images say, the student need know nothing.
        top1, top5 = correct_counts(logits[: len(batch.labels)], batch.foremost, batch.valid)
        counts = torch.stack([batch.valid.sum(), 100 * top1, 100 * top5]).double()
        means = torch.stack([loss.detach(), *parts.values()]).double()
        added = torch.cat([counts, means * counts[0]])
        added = torch.where(counted, added, 0.0)  # what is not counted may be no number
        names = (*_COUNTS, "loss", *(f"loss/{name}" for name in parts))
        self._sums[names] = self._sums.get(names, 0.0) + added
        self._images = self._images + added[0]

    def read(self) -> dict[str, float]:
        """The interval's metrics under their logged keys, `train/loss` and `train/loss/PART` among them.

        Starts the next interval.

        Of an interval without a step that was taken, only how fast it went.
        """
        totals = torch.cat([*self._sums.values(), (self._images - self._untimed)[None]])
        *sums, timed_images = self._cluster.sum(totals).tolist()
        seconds = time.perf_counter() - self._started
        totals_by_name: dict[str, float] = defaultdict(float)
        for name, value in zip(chain.from_iterable(self._sums), sums, strict=True):
            totals_by_name[name] += value
        images = totals_by_name.pop("images", 0.0)
        values = {f"train/{name}": value / images for name, value in totals_by_name.items() if images}
        values["images_per_second"] = timed_images / seconds
        values["data_wait_share"] = self._waited / seconds
        self._start_interval()
        return values
