"""Teacher-free knowledge distillation, by a virtual teacher or by self-training (Yuan et al.: CVPR 2020)."""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import nn

from kdav_fast.config.section import Fraction, PositiveWeight, Temperature
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Losses,
    Progress,
    label_loss,
    sum_of_parts,
)
from kdav_fast.distillers.terms.softened import (
    SoftenedConfig,
    require_several_classes,
    soft_target_kl,
    virtual_teacher_kl,
)
from kdav_fast.models.outputs import Outputs


class _Published(NamedTuple):
    alpha: float
    temperature: float
    multiplier: float


PUBLISHED = {
    "virtual_teacher": _Published(0.1, 20.0, 100.0),
    "self_training": _Published(0.95, 6.0, 50.0),
}
"""For CIFAR-100, ResNet-18."""


class TFKD(Distiller):
    """(1 - alpha) * cross-entropy with the labels + alpha * KL with a teacher that is none.

    "Revisiting Knowledge Distillation via Label Smoothing Regularization". `virtual_teacher`: KL(softmax(u/T) ||
    softmax(f/T)), no T^2. `self_training`: T^2 KL with the same network trained before, given as `teacher`.

    The authors' code, and so their numbers, take the KL's mean over B*K elements, times a multiplier, and leave the
    student at T 1 under the virtual teacher: `form` "code". Their multiplier 100 undoes the K of CIFAR-100. Other
    published settings of that form: MobileNetV2 0.95, T 40 (self-training 20), multiplier 1; ShuffleNetV2 0.95, 10
    (20), 1; GoogLeNet 0.1, 40, 50 (self-training 0.4, 20, 50). For ImageNet there is no code that runs.
    """

    class Config(SoftenedConfig):
        """Published for CIFAR-100, ResNet-18, in the code's form."""

        variant: Literal["virtual_teacher", "self_training"] = "virtual_teacher"
        """A made-up teacher, or the same network trained before, given as `teacher`."""
        form: Literal["paper", "code"] = "paper"
        """The paper's equation, or that of its code, which the published settings belong to."""
        alpha: Annotated[Fraction, Field(gt=0)] | None = None
        """Of the KL. Default: 0.1 with the virtual teacher, 0.95 in self-training."""
        temperature: Temperature | None = None
        """Default: 20 with the virtual teacher, 6 in self-training."""
        multiplier: PositiveWeight | None = None
        """Of the KL's mean over elements, in the code's form. Default: 100 with the virtual teacher, 50 in
        self-training."""

        @property
        def needs_teacher(self) -> bool:
            return self.variant == "self_training"

        @property
        def takes_mixed(self) -> bool:
            return self.variant == "self_training"

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.multiplier is not None and self.form == "paper":
                raise ValueError(
                    "distiller.multiplier is of the code's form; set distiller.form=code, or leave it out"
                )
            if self.standardize_logits and self.variant == "virtual_teacher":
                raise ValueError(
                    "distiller.standardize_logits does not go with distiller.variant 'virtual_teacher', which has no "
                    "logits; set it to false, or use distiller.variant=self_training"
                )
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_several_classes(config.name, facts)
        self.config, self.label_smoothing = config, facts.label_smoothing
        self.networks = facts.student.name, facts.teacher and facts.teacher.name
        given = {key: getattr(config, key) for key in _Published._fields}
        given = {key: value for key, value in given.items() if value is not None}
        self.settings = PUBLISHED[config.variant]._replace(**given)

    def remarks(self) -> Sequence[str]:
        if not self.config.needs_teacher:
            return self._remarks_on_form()
        student, teacher = self.networks
        if student == teacher:
            return ()
        return (
            f"note: distiller.variant is 'self_training' with the teacher {teacher} and the student {student}: the "
            "paper's teacher is the student itself, trained before",
        )

    def _remarks_on_form(self) -> Sequence[str]:
        if self.config.form == "code":
            return ()
        temperature = self.settings.temperature
        return (
            f"note: distiller.form is 'paper', in which the virtual teacher's gradient is divided twice by T, "
            f"{temperature:g}, and teaches next to nothing beside the labels; to repeat published numbers, use "
            "distiller.form=code",
        )

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config, (alpha, temperature, multiplier) = self.config, self.settings
        of_code = config.form == "code"
        if config.needs_teacher:
            softened = (config.prepared(each.logits) for each in (student, teacher))
            kl = soft_target_kl(*softened, temperature)
        else:
            kl = virtual_teacher_kl(
                student.logits, batch.labels, temperature, 1.0 if of_code else temperature
            )
        factor = multiplier / student.logits.shape[1] if of_code else 1.0
        hard = label_loss(student.logits, batch, self.label_smoothing)
        parts = {"cross_entropy": (1 - alpha, hard), "teacher_free_kl": (alpha * factor, kl)}
        return sum_of_parts(parts, batch.valid)


METHOD = TFKD
