"""The distiller section: one class a method."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdav_fast.config.section import Count, Fraction, NonNegative, Positive, Section


class NoDistiller(Section):
    """Labels only."""

    name: Literal["none"] = "none"


class KDConfig(Section):
    """Hinton's knowledge distillation: (1 - alpha) * CE + alpha * T^2 * KL."""

    name: Literal["kd"]
    alpha: Fraction = 0.9
    temperature: Positive = 4.0


class KDAVConfig(Section):
    """Knowledge distillation with an auxiliary variable; names follow `kdav_loss`."""

    name: Literal["kdav"]
    kappa_student: Positive = 10.0
    kappa_teacher: Positive = 10.0
    temperature: Positive = 1.0
    weight_membership: NonNegative = 1.0
    weight_prediction: NonNegative = 1.0
    weight_label: NonNegative = 0.0
    """Of the cross-entropy with the labels, where classes score kappa_student <mu_y, z/|z|>; 0: labels are not used."""
    memory_length: Count = 4096
    posterior: Literal["dense", "ids"] = "dense"
    """What the memory keeps of a remembered image: the teacher's class distribution or one class id."""
    center: bool = True
    """Centre teacher embeddings by their mean over the training set, measured before training."""
    prototypes: Literal["measured", "running"] = "measured"
    """Class means from one pass before training, or from running sums during training."""
    impl: Literal["auto", "reference", "chunked", "triton", "compile"] = "auto"

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.weight_membership == 0 and self.weight_prediction == 0:
            raise ValueError(
                "distiller.weight_membership and distiller.weight_prediction are both 0; raise one"
            )
        return self


class SimKDConfig(Section):
    """The teacher's classifier on features trained to be the teacher's."""

    name: Literal["simkd"]
    weight_feature: NonNegative = 1.0
    """Of the mean squared difference of the features; the paper's only term."""
    weight_kl: NonNegative = 0.0
    """Of T^2 KL between the teacher's and the student's class distributions."""
    temperature: Positive = 4.0
    """T of the KL term."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.weight_feature == 0 and self.weight_kl == 0:
            raise ValueError("distiller.weight_feature and distiller.weight_kl are both 0; raise one")
        return self


DistillerConfig = Annotated[NoDistiller | KDConfig | KDAVConfig | SimKDConfig, Field(discriminator="name")]
