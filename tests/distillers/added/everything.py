"""A method for tests, without a teacher, that uses all else there is at once."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config import MethodConfig
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import Views
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
from kdav_fast.distillers.memories.sample import SampleMemory
from kdav_fast.distillers.phases import Fit, Measure, Phase
from kdav_fast.models.outputs import Outputs
from tests.distillers.added_methods import reached


class Weight(nn.Module):
    """A number that is learned, and used without calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(1))


class Everything(Distiller):
    """Labels; agreement with what was said of the image before; the colour of a class, read off feature maps."""

    order = Views(2)

    class Config(MethodConfig):
        needs_teacher = False
        takes_mixed = False
        needs_stages = True
        needs_preactivations = True

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.label_smoothing = facts.label_smoothing
        self.memory = SampleMemory(len(facts.labels), facts.classes)
        self.register_buffer("color_sum", torch.zeros(facts.classes, 3, dtype=torch.float64))
        self.register_buffer("color_mass", torch.zeros(facts.classes, dtype=torch.float64))
        self.register_buffer("color", torch.zeros(facts.classes, 3))
        self.lend("_reader", _small_network(facts.student.stages[-1][0]))
        self.lend("_painter", _small_network(3))
        self.lend("_weight", Weight())

    def learned(self) -> dict[str, Learned]:
        return {
            "reader": Learned(self._reader, lr_factor=0.5, weight_decay=1e-3),
            "painter": Learned(self._painter, lr_factor=0.1, weight_decay=0.0),
            "weight": Learned(self._weight),
        }

    def phases(self) -> Sequence[Phase]:
        return (
            Measure("the classes' colours", self._observe, (self.color_sum, self.color_mass), self._finish),
            Fit("a painter", ("painter",), self._paint, epochs=1.0, lr=0.05),
        )

    def forward(
        self,
        student: Outputs,
        teacher: None,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        reached("train")
        first, second = student.logits.unflatten(0, (batch.views, -1))
        rows = {"cross_entropy": label_loss(first, batch, self.label_smoothing)}
        before, seen = self.memory.rows(batch.index), self.memory.seen(batch.index)
        kl = F.kl_div(second.log_softmax(1), before, reduction="none").sum(1)
        rows["agreement_kl"] = kl.where(seen, 0.0)
        self.memory.update(batch.index, first.detach().softmax(1), batch.valid)

        read, painted = learned["reader"](student.stages[-1]), learned["painter"](batch.images)
        rows["color_mse"] = _row_means((widened(read) - widened(painted)).square(), batch)
        weight = learned["weight"].logarithm.exp()
        rows["margin"] = _row_means(F.softplus(-weight * widened(student.preactivations[0])), batch)
        means = {name: mean_over_valid(row, batch.valid) for name, row in rows.items()}
        total = sum(means.values()) * (1 - 0.5 * progress.step / progress.steps)
        return Losses(total, {name: mean.detach() for name, mean in means.items()})

    def _observe(self, batch: Batch, teacher: None) -> None:
        reached("measure")
        mass = F.one_hot(batch.labels, len(self.color)).double() * batch.valid[:, None]
        colors = batch.images.mean((2, 3)).double().where(batch.valid[:, None], 0.0)
        self.color_sum += mass.T @ colors
        self.color_mass += mass.sum(0)

    def _finish(self) -> None:
        self.color.copy_(self.color_sum / self.color_mass.clamp(min=1)[:, None])

    def _paint(self, teacher: None, batch: Batch, learned: dict[str, nn.Module]) -> Losses:
        reached("fit")
        painted = widened(learned["painter"](batch.images))
        mse = (painted - self.color[batch.labels].repeat(batch.views, 1)).square()
        loss = mean_over_valid(_row_means(mse, batch), batch.valid)
        return Losses(loss, {"color_mse": loss.detach()})


def _small_network(channels: int) -> nn.Module:
    """To three numbers a row."""
    layers = nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def _row_means(values: Tensor, batch: Batch) -> Tensor:
    """V*B x ... values to a mean of each of B images."""
    return values.flatten(1).mean(1).unflatten(0, (batch.views, -1)).mean(0)


METHOD = Everything
