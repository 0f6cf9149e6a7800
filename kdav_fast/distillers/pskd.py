"""Self-distillation with progressive refinement of targets (Kim, Ji, Yoon, Hwang: ICCV 2021)."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Fraction
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Losses,
    Progress,
    label_loss,
    sum_of_parts,
    widened,
)
from kdav_fast.distillers.memories.sample import SampleMemory
from kdav_fast.models.outputs import Outputs


def probability_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """-sum_k P_k log softmax(f)_k of each row, B; both B x K. Halves are widened."""
    return -(probabilities * widened(logits).log_softmax(1)).sum(1)


class PSKD(Distiller):
    """(1 - a) * cross-entropy with the labels + a * that with what the student said of the image an epoch ago.

    "Self-Knowledge Distillation with Progressive Refinement of Targets". a = alpha * epoch / epochs, epochs counted
    from 1. What it says is the softmax at T 1 in training, augmented; an image not yet seen has its label. There is
    no teacher.

    Remembers N x K probabilities of N training images in float16: 2.4 GiB for ImageNet, on the host where they would
    take half of the free device memory; refused where they do not fit there either.
    """

    class Config(MethodConfig):
        """Published for CIFAR-100, 300 epochs, and for ImageNet."""

        needs_teacher: ClassVar[bool] = False
        takes_mixed: ClassVar[bool] = False
        alpha: Annotated[Fraction, Field(gt=0)] = 0.8
        """Share of the remembered answers in the last epoch."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config, self.label_smoothing = config, facts.label_smoothing
        self.memory = SampleMemory(
            len(facts.labels),
            facts.classes,
            device=facts.device,
            remedy="take fewer images (data.train_subset), or another distiller.name",
        )

    def forward(
        self,
        student: Outputs,
        teacher: None,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        hard = label_loss(student.logits, batch, self.label_smoothing)
        before, seen = self.memory.rows(batch.index), self.memory.seen(batch.index)
        soft = probability_cross_entropy(student.logits, before).where(seen, hard)
        self.memory.update(batch.index, widened(student.logits).detach().softmax(1), batch.valid)
        share = self.config.alpha * min((int(progress.epoch) + 1) / progress.epochs, 1.0)
        parts = {"cross_entropy": (1 - share, hard), "self_cross_entropy": (share, soft)}
        return sum_of_parts(parts, batch.valid)


METHOD = PSKD
