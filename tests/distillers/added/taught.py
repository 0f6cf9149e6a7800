"""A method for tests, with what only methods with a teacher use: its feature maps, a head, phases that ask it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdav_fast.config import MethodConfig
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import ClassPairs
from kdav_fast.distillers.base import Distiller, Facts, Learned, Losses, Progress, mean_over_valid, widened
from kdav_fast.distillers.phases import Fit, Measure, Phase
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import ReusedClassifierHead
from tests.distillers.added_methods import reached


class Taught(Distiller):
    """The teacher's classifier on features trained to be the teacher's, and feature maps through a paraphraser."""

    order = ClassPairs()

    class Config(MethodConfig):
        needs_stages = True
        uses_labels = False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        classifier = facts.teacher_classifier
        head = ReusedClassifierHead(facts.student.features, classifier.in_features, classifier.out_features)
        head.reuse(classifier)
        self.lend("_head", head)
        narrow, wide = facts.student.stages[-1][0], facts.teacher.stages[-1][0]
        self.lend("_paraphraser", _convolutions(wide, wide))
        self.lend("_translator", _convolutions(narrow, wide))
        self.register_buffer("square_sum", torch.zeros(facts.teacher.features, dtype=torch.float64))
        self.register_buffer("mass", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones(facts.teacher.features))

    def head(self) -> ReusedClassifierHead:
        return self._head

    def learned(self) -> dict[str, Learned]:
        return {
            "paraphraser": Learned(self._paraphraser),
            "translator": Learned(self._translator, lr_factor=2.0),
        }

    def phases(self) -> Sequence[Phase]:
        return (
            Measure("the teacher's features", self._observe, (self.square_sum, self.mass), self._finish),
            Fit("a paraphraser", ("paraphraser",), self._paraphrase, epochs=0.6, lr=0.05, momentum=0.5),
        )

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        reached("train")
        feature = _loss((student.embedding - teacher.features) / self.scale, batch)
        said = learned["paraphraser"](teacher.stages[-1])
        stage = _loss(widened(learned["translator"](student.stages[-1])) - widened(said), batch)
        return Losses(feature + stage, {"feature_mse": feature.detach(), "stage_mse": stage.detach()})

    def _observe(self, batch: Batch, teacher: Outputs) -> None:
        reached("measure")
        self.square_sum += teacher.features.where(batch.valid[:, None], 0.0).double().square().sum(0)
        self.mass += batch.valid.sum()

    def _finish(self) -> None:
        self.scale.copy_((self.square_sum / self.mass).sqrt().clamp(min=1e-3))

    def _paraphrase(self, teacher: Outputs, batch: Batch, learned: dict[str, nn.Module]) -> Losses:
        reached("fit")
        stage = teacher.stages[-1]
        loss = _loss(widened(learned["paraphraser"](stage)) - widened(stage), batch)
        return Losses(loss, {"stage_mse": loss.detach()})


def _convolutions(channels: int, wide: int) -> nn.Module:
    layers = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, wide, 1)
    return nn.Sequential(*layers)


def _loss(differences: Tensor, batch: Batch) -> Tensor:
    rows = differences.square().flatten(1).mean(1).unflatten(0, (batch.views, -1)).mean(0)
    return mean_over_valid(rows, batch.valid)


METHOD = Taught
