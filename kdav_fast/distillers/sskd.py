"""Knowledge distillation meets self-supervision (Xu, Liu, Li, Loy: ECCV 2020)."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdav_fast.config.data import DataConfig
from kdav_fast.config.section import Epochs, Fraction, Positive, Temperature, Weight
from kdav_fast.config.training import TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import Rotations
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Learned,
    Losses,
    Progress,
    label_loss,
    mean_over_valid,
    widened,
)
from kdav_fast.distillers.phases import Fit
from kdav_fast.distillers.terms.feature_method import require_images, require_own_terms
from kdav_fast.distillers.terms.maps import require_features
from kdav_fast.distillers.terms.self_supervision import similarities, trusted
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.models.outputs import Outputs

_LEAST_AREA = 0.2
"""Of a crop in which up and down can still be told."""


def head(width: int) -> nn.Sequential:
    """Two linear layers of the features' width."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class SSKD(Distiller):
    """Labels and KL on plain images, KL on turned ones, and KL between similarities of turned and plain images.

    Each image is seen in four turns. Which plain image a turned one is of, a head on the teacher's features learns to
    tell before distillation; the student's head learns the teacher's similarities. On turned images the teacher
    counts only where it is `trusted`. Similarities and trust are those of the batch of all processes.

    The authors give each turn a crop of its own and lower the head's learning rate in steps; here one crop is turned,
    and the rate falls as a cosine. They train their teachers on plain images, as is done here.
    """

    order = Rotations(4)

    class Config(SoftenedConfig):
        """Published for CIFAR-100, the only data in the authors' code."""

        takes_mixed: ClassVar[bool] = False
        weight_label: Weight = 0.1
        """Of the cross-entropy on plain images."""
        weight_kl: Weight = 0.9
        """Of T^2 KL on plain images."""
        weight_transform: Weight = 2.7
        """Of T^2 KL on turned images."""
        weight_similarity: Weight = 10.0
        """Of T^2 KL between similarities."""
        temperature: Temperature = 4.0
        """T of both terms on logits."""
        similarity_temperature: Temperature = 0.5
        """T of the similarities."""
        ratio_transform: Fraction = 1.0
        """Of turned images that the teacher takes for another class, those on which it counts."""
        ratio_similarity: Fraction = 0.75
        """Of turned images that the teacher's head takes for another image, those on which it counts."""
        head_epochs: Annotated[Epochs, Field(gt=0)] = 60.0
        """In which the teacher's head is trained."""
        head_lr: Annotated[Positive, Field(le=10)] = 0.05
        """Of its training, at first."""

        def check_run(self, train: TrainConfig) -> None:
            require_images(self, train, 2, "which tells images apart")

        @model_validator(mode="after")
        def _something_of_its_own(self) -> Self:
            require_own_terms(self, "weight_transform", "weight_similarity")
            return self

        @property
        def uses_labels(self) -> bool:
            return self.weight_label > 0

        def check_data(self, data: DataConfig) -> None:
            if data.crop == "random_resized" and data.crop_area[0] < _LEAST_AREA:
                raise ValueError(
                    f"data.crop_area begins at {data.crop_area[0]} with distiller.name 'sskd', which asks how an image "
                    f"is turned: a crop that small does not show it; use data.crop_area=[{_LEAST_AREA}, 1.0], or "
                    "data.crop=padded"
                )

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_features("sskd", facts.student, facts.teacher)
        self.config, self.label_smoothing = config, facts.label_smoothing
        self.lend("_student_head", head(facts.student.features))
        self.lend("_teacher_head", head(facts.teacher.features))

    def learned(self) -> dict[str, Learned]:
        # The teacher's is trained in the phase alone.
        fixed = Learned(self._teacher_head, lr_factor=0.0, weight_decay=0.0)
        return {"student_head": Learned(self._student_head), "teacher_head": fixed}

    def phases(self) -> Sequence[Fit]:
        config = self.config
        name = "the teacher's self-supervised head"
        return (Fit(name, ("teacher_head",), self.head_loss, config.head_epochs, config.head_lr),)

    def head_loss(self, teacher: Outputs, batch: Batch, learned: dict[str, nn.Module]) -> Losses:
        """Cross-entropy of a turned image's similarities with its own image; of the phase."""
        embedding = _by_image(widened(learned["teacher_head"](teacher.features)))
        valid, embedding = gather_batch(batch.valid, embedding)
        rows = F.cross_entropy(similarities(embedding, valid), _own_image(valid), reduction="none")
        loss = mean_over_valid(rows, valid.repeat_interleave(3))
        return Losses(loss, {"own_image": loss.detach()})

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config = self.config
        with torch.no_grad():
            taught = widened(learned["teacher_head"](teacher.features))
        embeddings = _by_image(widened(learned["student_head"](student.features))), _by_image(taught)
        logits = [_by_image(outputs.logits) for outputs in (student, teacher)]
        softened = [_by_image(config.prepared(outputs.logits)) for outputs in (student, teacher)]
        hard = label_loss(logits[0][:, 0], batch, self.label_smoothing)
        soft = soft_target_kl(softened[0][:, 0], softened[1][:, 0], config.temperature)

        valid, labels, scores, *columns = gather_batch(
            batch.valid, batch.labels, logits[1], *softened, *embeddings
        )
        counted = valid.repeat_interleave(3)
        turned = [each[:, 1:].flatten(0, 1) for each in (scores, *columns[:2])]
        right = trusted(turned[0], labels.repeat_interleave(3), counted, config.ratio_transform)
        transform = soft_target_kl(*turned[1:], config.temperature)
        seen, known = (similarities(each, valid) for each in columns[2:])
        own = trusted(known, _own_image(valid), counted, config.ratio_similarity)
        similar = soft_target_kl(seen, known, config.similarity_temperature)
        terms = {
            "cross_entropy": (config.weight_label, mean_over_valid(hard, batch.valid)),
            "soft_target_kl": (config.weight_kl, mean_over_valid(soft, batch.valid)),
            "transform_kl": (config.weight_transform, mean_over_valid(transform, right)),
            "similarity_kl": (config.weight_similarity, mean_over_valid(similar, own)),
        }
        total = sum(weight * mean for weight, mean in terms.values())
        return Losses(total, {name: mean.detach() for name, (_, mean) in terms.items()})


def _by_image(rows: Tensor) -> Tensor:
    """4B x d rows, view-major, to B x 4 x d."""
    return rows.unflatten(0, (4, -1)).transpose(0, 1)


def _own_image(valid: Tensor) -> Tensor:
    """Of 3B turned images the plain ones that they are of."""
    return torch.arange(len(valid), device=valid.device).repeat_interleave(3)


METHOD = SSKD
