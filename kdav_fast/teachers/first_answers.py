"""A look at what the teacher answers at first: a damaged or misplaced teacher is told before it has taught anything."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdav_fast.data.batch import Batch
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.precision import dtype_name
from kdav_fast.runtime.processes import Cluster
from kdav_fast.teachers.frozen import FrozenTeacher

_FEWEST = 16  # images: of fewer, guessing is as good as knowing


class _Seen(NamedTuple):
    """Of one rank's batch, or of all ranks'."""

    images: int
    features: int
    """Images whose features are not finite."""
    logits: int
    alike: bool
    """Whether every image has the same logits."""


class FirstAnswers:
    """Judges a teacher by its first batch, and by how often it is right until `tell`.

    Only the first batch waits for the device.

    Args:
        teacher: whose answers.
        source: what its weights are called in messages.
        cluster: the run's processes.
    """

    def __init__(self, teacher: FrozenTeacher, source: str, cluster: Cluster) -> None:
        self._teacher, self._source, self._cluster = teacher, source, cluster
        self._first, self._told = True, False
        self._counts = torch.zeros(2, device=cluster.device)

    @torch.no_grad()
    def see(self, batch: Batch, answers: Outputs) -> None:
        """A batch and what the teacher answered to it; every rank must call this.

        Raises:
            InputError: it is the first one, and not all answers are finite.
        """
        if self._told:
            return
        if self._first:
            self._first = False
            self._judge(batch.images, answers, batch.valid_rows)
        # Of other views, turned images say, it need know nothing.
        right = (answers.logits[: len(batch.labels)].argmax(1) == batch.foremost) & batch.valid
        self._counts += torch.stack([right.sum(), batch.valid.sum()])
        self._classes = answers.logits.shape[1]

    def tell(self) -> None:
        """Say it if so far the teacher was right no more often than by chance; then look at nothing more."""
        if self._told or self._first:
            return
        self._told = True
        right, images = self._cluster.sum(self._counts).tolist()
        chance = images / self._classes
        if images >= _FEWEST and right <= chance + 2 * math.sqrt(chance * (1 - 1 / self._classes)):
            self._cluster.say(
                f"warning: the teacher answers {right:.0f} of {images:.0f} training images right, no more than "
                f"guessing would; see whether {self._source} is for these classes, in this order, and for this input "
                "normalisation"
            )

    def _judge(self, images: Tensor, answers: Outputs, valid: Tensor) -> None:
        seen = self._gathered(answers, valid)
        what = " and ".join(name for name in ("features", "logits") if getattr(seen, name))
        if what:
            raise InputError(
                f"the teacher's {what} of {max(seen.features, seen.logits)} of the first {seen.images} images are not "
                f"finite in {dtype_name(self._teacher.dtype)}{self._remedy(images, valid)}"
            )
        if seen.alike and seen.images > 1:
            self._cluster.say(
                f"warning: the teacher answers the same to each of the first {seen.images} images; see whether "
                f"{self._source} is trained"
            )

    def _remedy(self, images: Tensor, valid: Tensor) -> str:
        if self._teacher.dtype is not None:
            seen = self._gathered(self._teacher.answer(images.float(), None), valid)
            if not seen.features and not seen.logits:
                return ", but they are in fp32; set teacher.precision=bf16 or fp32"
        return f"; mend or replace {self._source}, and check teacher.mean and teacher.std"

    def _gathered(self, answers: Outputs, valid: Tensor) -> _Seen:
        features, logits = answers.features[valid], answers.logits[valid]
        first = logits[:1].tolist()
        mine = _Seen(
            len(logits),
            int((~features.isfinite().all(1)).sum()),
            int((~logits.isfinite().all(1)).sum()),
            bool((logits == logits[:1]).all()),
        )
        ranks = [(seen, row) for seen, row in self._cluster.gather((mine, first)) if seen.images]
        rows = [row for _, row in ranks]
        return _Seen(
            sum(seen.images for seen, _ in ranks),
            sum(seen.features for seen, _ in ranks),
            sum(seen.logits for seen, _ in ranks),
            all(seen.alike for seen, _ in ranks) and all(row == rows[0] for row in rows),
        )
