"""Curriculum temperature, one for all images (Li et al.: AAAI 2023)."""

import math

import torch
from torch import Tensor, nn

from kdav_fast.config.section import Epochs, PositiveWeight, Temperature, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Learned,
    Losses,
    Progress,
    label_loss,
    sum_of_parts,
)
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.models.outputs import Outputs


def curriculum(epoch: float, epochs: float) -> float:
    """By what the temperature's gradient is multiplied, 0 to -1 by a cosine over the first epochs.

    Args:
        epoch: passes behind; within one the factor is constant, and the first one's is already below 0.
        epochs: how many to -1.
    """
    done = min((int(epoch) + 1) / epochs, 1.0) if epochs else 1.0
    return (math.cos(done * math.pi) - 1) / 2


class GlobalTemperature(nn.Module):
    """One number, whose gradient is multiplied by a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.ones(1))

    def forward(self, factor: float) -> Tensor:
        """The number; with a factor below 0, training goes up its gradient."""
        return self.logit.detach() + factor * (self.logit - self.logit.detach())


class CTKD(Distiller):
    """weight_label * cross-entropy with the labels + weight_kl * T^2 KL with the teacher, T learned to raise the loss.

    "Curriculum Temperature for Knowledge Distillation", the global variant: T = temperature_start + temperature_range *
    sigmoid(g), g from 1 on, trained beside the student at its learning rate by a gradient that is reversed little by
    little.
    """

    class Config(SoftenedConfig):
        """Published for CIFAR-100; for ImageNet, ResNet-34 to -18: both weights 1, curriculum_epochs 5."""

        temperature_start: Temperature = 1.0
        """The lowest temperature."""
        temperature_range: Temperature = 20.0
        """How far above it the temperature may be trained."""
        curriculum_epochs: Epochs = 10.0
        """In which the gradient's reversal comes in."""
        weight_label: Weight = 0.1
        """Of the cross-entropy with the labels."""
        weight_kl: PositiveWeight = 0.9
        """Of T^2 KL(teacher || student)."""

        @property
        def uses_labels(self) -> bool:
            return self.weight_label > 0

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config, self.label_smoothing = config, facts.label_smoothing
        self.lend("_temperature", GlobalTemperature())

    def learned(self) -> dict[str, Learned]:
        return {"temperature": Learned(self._temperature)}

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config = self.config
        logit = learned["temperature"](curriculum(progress.epoch, config.curriculum_epochs)).squeeze()
        temperature = config.temperature_start + config.temperature_range * logit.sigmoid()
        softened = (config.prepared(each.logits) for each in (student, teacher))
        hard = label_loss(student.logits, batch, self.label_smoothing)
        parts = {
            "cross_entropy": (config.weight_label, hard),
            "soft_target_kl": (config.weight_kl, soft_target_kl(*softened, temperature)),
        }
        losses = sum_of_parts(parts, batch.valid)
        losses.parts["temperature"] = temperature.detach()
        return losses


METHOD = CTKD
