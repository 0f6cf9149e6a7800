"""Terms of class distributions softened by a temperature, and the standardisation of the logits before."""

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from kdav_fast.config.method import MethodConfig
from kdav_fast.distillers.base import Facts, widened
from kdav_fast.errors import InputError

_TINY_DEVIATION = 1e-7
_CORRECT_PROBABILITY = 0.99
"""Of the label in a virtual teacher; the others share the rest."""


class SoftenedConfig(MethodConfig):
    """Of a method whose loss softens logits.

    Logit standardisation (Sun et al., CVPR 2024, "Logit Standardization in Knowledge Distillation"): student and
    teacher meet with logits of mean 0 and deviation 1 in each row, at T 2 mostly. The cross-entropy with the labels,
    and weights that a method derives from it, see the logits as they are. Published for CIFAR-100: `kd` with
    temperature 2, weight_label 0.1, weight_kl 9 (ImageNet: weight_label 1); `dkd` with temperature 2, alpha 9, beta 72.
    The paper divides by the population deviation, its code by the sample deviation + 1e-7.
    """

    standardize_logits: bool = False
    """Standardise each row of logits before softening."""
    sample_deviation: bool = False
    """Standardise by the sample deviation + 1e-7, as the published code does: K - 1 in place of K."""

    @model_validator(mode="after")
    def _standardization(self) -> Self:
        if self.sample_deviation and not self.standardize_logits:
            raise ValueError(
                "distiller.sample_deviation is of the logits' standardisation, which is off; set "
                "distiller.standardize_logits=true, or leave it false"
            )
        return self

    def check_classes(self, classes: int) -> None:
        if self.standardize_logits and classes < 3:
            raise InputError(
                f"distiller.standardize_logits does not go with {classes} classes: of two logits, standardised, one is "
                "1 and the other -1, whatever they are; set it to false"
            )

    def prepared(self, logits: Tensor) -> Tensor:
        """Logits, B x K, as they are softened."""
        return standardized(logits, self.sample_deviation) if self.standardize_logits else logits


def standardized(logits: Tensor, sample: bool = False) -> Tensor:
    """(z - mean) / deviation of each row z of B x K logits. Halves are widened.

    Args:
        logits: B x K.
        sample: the sample deviation + 1e-7 in place of the population's. Where the logits are equal, it is 1.
    """
    centred = widened(logits) - widened(logits).mean(1, keepdim=True)
    freedom = max(logits.shape[1] - sample, 1)
    variance = centred.square().sum(1, keepdim=True) / freedom
    # Equal logits have no deviation, and the root no gradient at 0.
    deviation = variance.where(variance > _TINY_DEVIATION**2, 1.0).sqrt()
    return centred / (deviation + _TINY_DEVIATION if sample else deviation)


def soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 KL(softmax(g/T) || softmax(f/T)) of each row, B (Hinton, Vinyals, Dean 2015). Halves are widened."""
    log_p = F.log_softmax(widened(student_logits) / temperature, dim=1)
    log_q = F.log_softmax(widened(teacher_logits) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


def virtual_teacher_kl(
    student_logits: Tensor, labels: Tensor, temperature: float, student_temperature: float
) -> Tensor:
    """KL(softmax(u / T) || softmax(f / T')) of each row, B, with u 0.99 at the label. Halves are widened.

    Args:
        student_logits: f, B x K, of at least two classes.
        labels: B class ids.
        temperature: T, of a softmax of probabilities: the virtual teacher is nearly uniform.
        student_temperature: T'.
    """
    log_p = (widened(student_logits) / student_temperature).log_softmax(1)
    classes = log_p.shape[1]
    u = torch.full_like(log_p, (1 - _CORRECT_PROBABILITY) / (classes - 1))
    u = u.scatter(1, labels[:, None], _CORRECT_PROBABILITY)
    return F.kl_div(log_p, torch.softmax(u / temperature, 1), reduction="none").sum(1)


def log_softmax_of_others(scaled: Tensor, target: Tensor) -> Tensor:
    """The log-softmax over all classes but the target of each row, B x K with 0 at the target.

    Args:
        scaled: B x K logits, divided by their temperature.
        target: B x K booleans, True at the target.
    """
    return scaled.masked_fill(target, -torch.inf).log_softmax(1).masked_fill(target, 0.0)


def remarks_on_classes(name: str, classes: int, term: str) -> tuple[str, ...]:
    """What to say where a term is of the classes beside the labelled one, and there is one alone."""
    if classes > 2:
        return ()
    return (f"note: with two classes {term} of distiller.name '{name}' is constant and teaches nothing",)


def require_several_classes(name: str, facts: Facts) -> None:
    """Raise `InputError` where there are no other classes, from which a method tells the labelled one."""
    if facts.classes < 2:
        raise InputError(
            f"distiller.name '{name}' tells a class from the others, but the data have one class; use "
            "distiller.name=none"
        )
