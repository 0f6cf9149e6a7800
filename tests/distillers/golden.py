"""Golden vectors: published methods' losses and gradients in float64, from their authors' code."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Losses, Progress
from kdav_fast.models.outputs import Outputs
from tests.kernels.golden import REPOSITORY

FOLDER = Path(os.environ.get("KDAV_GOLDEN_METHODS", REPOSITORY / "tests" / "golden" / "methods"))
"""Holds `NAME_1.npz`, `NAME_2.npz` and so on; another folder of the same kind may be named instead."""


def golden_cases(method: str) -> list[str]:
    """The cases of a method."""
    return [path.stem for path in sorted(FOLDER.glob(f"{method}_*.npz"))]


def load_golden(case: str) -> dict[str, np.ndarray]:
    """Inputs, settings and truth of a case, by name."""
    with np.load(FOLDER / f"{case}.npz") as archive:
        return dict(archive)


BEGINNING = Progress(step=0, steps=100, epoch=0.0, epochs=10.0)


class Golden:
    """A case in one of its settings: an array that the setting's prefix does not repeat is the unprefixed one."""

    def __init__(self, case: str, prefix: str = "") -> None:
        self._arrays, self._prefix = load_golden(case), prefix

    def __getitem__(self, name: str) -> Tensor:
        prefixed = self._prefix + name
        return torch.from_numpy(np.asarray(self._arrays[prefixed if prefixed in self._arrays else name]))

    def numbers(self, **keys: str) -> dict[str, float]:
        """Settings of a method by the names they have here: `numbers(weight_label="ce_weight")`."""
        return {key: float(self[name]) for key, name in keys.items()}

    def leaves(self, *names: str) -> list[Tensor]:
        """Inputs that get a gradient."""
        return [self[name].clone().requires_grad_() for name in names]

    @property
    def classes(self) -> int:
        """K."""
        return self["student_logits"].shape[1]

    @property
    def facts(self) -> dict[str, object]:
        """What is known before training, where it is of these images."""
        return {"classes": self.classes, "labels": self["target"].numpy()}

    def losses(
        self,
        distiller: Distiller,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor] | None = None,
        progress: Progress = BEGINNING,
        learned: dict[str, nn.Module] | None = None,
        stages: tuple[Tensor, ...] = (),
    ) -> Losses:
        """A method's, of logits in one view or more, `stages` the student's; the gradients are taken."""
        labels = self["target"]
        batch = Batch(
            torch.zeros(len(labels) * len(student), 1),
            labels,
            torch.ones_like(labels, dtype=torch.bool),
            torch.arange(len(labels)),
            views=len(student),
        )
        student, teacher = (
            views and Outputs(torch.cat(views)[:, :0], torch.cat(views)) for views in (student, teacher)
        )
        losses = distiller(student._replace(stages=stages), teacher, batch, learned or {}, progress)
        losses.total.backward()
        return losses


class Saying(nn.Module):
    """Stands for a learned module whose answer is given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, asked: object) -> Tensor:
        return self.answer
