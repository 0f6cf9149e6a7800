"""Contrastive consistent representation distillation (Fu, Yang, Yang: BMVC 2023)."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Fraction, Mark, Temperature, Weight, Width, within
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import Views
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Learned,
    Losses,
    Progress,
    label_loss,
    sum_of_parts,
    widened,
)
from kdav_fast.distillers.memories.checks import require_room
from kdav_fast.distillers.memories.queue import Queue
from kdav_fast.distillers.memories.slow_copy import follow, slow_copy
from kdav_fast.distillers.terms.contrast import prediction_distance, queue_contrast
from kdav_fast.distillers.terms.feature_method import require_own_terms
from kdav_fast.distillers.terms.maps import require_features
from kdav_fast.models.outputs import Outputs


def head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class CoCoRD(Distiller):
    """weight_label * cross-entropy + weight_contrast * contrast + weight_predict * consistency.

    Each image in three views. The student's embedding of the first is contrasted with the teacher's of the third among
    the teacher's last embeddings; from its embeddings of the first two, a predictor finds those that a slow student,
    the student's running average, makes of the other one. The teacher's head is a running average of the student's. In
    the authors' code it therefore needs the student's width; here, where widths differ, its first layer stays random.

    The slow student and the heads' averages are taken over the steps: at one they are of the weights that it starts
    with. The views pass each network together, and student and teacher see all three, where in the authors' code they
    see two and one, each by itself.
    """

    order = Views(3)

    class Config(MethodConfig):
        """Published for CIFAR-100."""

        takes_mixed: ClassVar[bool] = False
        weight_label: Weight = 1.0
        """Of the cross-entropy on the first view."""
        weight_contrast: Weight = 1.0
        """Of the contrast with the teacher."""
        weight_predict: Weight = 4.0
        """Of the consistency with the slow student."""
        contrast_temperature: Temperature = 0.1
        """T of the contrast."""
        slow_momentum: Fraction = 0.9
        """Of the slow student and its head: what stays of them at a step."""
        teacher_momentum: Fraction = 0.999
        """Of the teacher's head."""
        queue: Annotated[
            int, within(1, 2**24, "each step compares every image with all of them"), Mark.SIZE
        ] = 2048
        """Embeddings of the teacher that are remembered."""
        hidden: Width = 2048
        """Width of the heads between their layers."""
        width: Width = 2048
        """Of embeddings."""
        predictor: Width = 512
        """Width of the predictor between its layers."""

        @model_validator(mode="after")
        def _something_of_its_own(self) -> Self:
            require_own_terms(self, "weight_contrast", "weight_predict")
            return self

        @property
        def uses_labels(self) -> bool:
            return self.weight_label > 0

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_features("cocord", facts.student, facts.teacher)
        self.config, self.label_smoothing, self.dtype = config, facts.label_smoothing, facts.dtype
        self.widths = facts.student.features, facts.teacher.features
        proj = head(facts.student.features, config.hidden, config.width)
        teacher_proj = head(facts.teacher.features, config.hidden, config.width)
        self.lend("_proj", proj)
        self.lend("_pred", head(config.width, config.predictor, config.width))
        self.slow_proj, self.teacher_proj = slow_copy(proj), slow_copy(teacher_proj)
        follow(self.teacher_proj, proj, momentum=0.0)
        require_room(
            f"distiller.queue {config.queue} x distiller.width {config.width} values",
            4 * config.queue * config.width,
            facts.device,
            "lower one of them",
        )
        self.queue = Queue(config.queue, config.width, facts.dtype)

    def meet(self, student: nn.Module) -> None:
        self.slow_student = slow_copy(student)

    def after_step(self, student: nn.Module, learned: dict[str, nn.Module]) -> None:
        follow(self.slow_student, student, self.config.slow_momentum)
        follow(self.slow_proj, learned["s_q_proj"], self.config.slow_momentum)
        follow(self.teacher_proj, learned["s_q_proj"], self.config.teacher_momentum)

    def learned(self) -> dict[str, Learned]:
        return {"s_q_proj": Learned(self._proj), "s_q_pred": Learned(self._pred)}

    def remarks(self) -> Sequence[str]:
        student, teacher = self.widths
        if student == teacher:
            return ()
        return (
            f"note: distiller.name 'cocord' with {student} features of the student and {teacher} of the teacher: the "
            "first layer of the teacher's head stays random, as it cannot be an average of the student's",
        )

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config, project, predict = self.config, learned["s_q_proj"], learned["s_q_pred"]
        q, k = (widened(project(features)) for features in student.features.chunk(3)[:2])
        key, slow_q, slow_k = self._keys(teacher, batch, project.training)
        hard = label_loss(student.logits.chunk(3)[0], batch, self.label_smoothing)
        contrast = queue_contrast(F.normalize(q, dim=1), key, self.queue.rows, config.contrast_temperature)
        consistency = prediction_distance(widened(predict(q)), slow_k) + prediction_distance(
            widened(predict(k)), slow_q
        )
        self.queue.push(key, batch.valid)
        parts = {
            "cross_entropy": (config.weight_label, hard),
            "contrast": (config.weight_contrast, contrast),
            "consistency": (config.weight_predict, consistency),
        }
        return sum_of_parts(parts, batch.valid)

    @torch.no_grad()
    def _keys(self, teacher: Outputs, batch: Batch, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's embeddings of the third view, of length 1, and the slow student's of the first two."""
        for module in (self.slow_student, self.slow_proj, self.teacher_proj):
            module.train(training)
        key = F.normalize(self.teacher_proj(teacher.features.chunk(3)[2]), dim=1)
        slow = self.slow_features(batch.images.chunk(3)[:2])
        return key, *(self.slow_proj(features) for features in slow)

    def slow_features(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """The slow student's of each view, in the precision of networks."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(views[0].device.type, self.dtype if half else None, enabled=half):
            return self.slow_student(torch.cat(views)).features.float().chunk(len(views))


METHOD = CoCoRD
