"""SimKD: the teacher's classifier on aligned features (Chen, Mei, Zhang, Wang, Feng, Chen: CVPR 2022)."""

from typing import ClassVar, Self

from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.section import NonNegative, Temperature
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, sum_of_parts, widened
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import ReusedClassifierHead


def feature_mse(student_embedding: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over the d features of the squared difference, of each row of two B x d tensors: B. Halves are widened."""
    return (widened(student_embedding) - widened(teacher_features)).square().mean(1)


class SimKD(Distiller):
    """weight_feature * MSE of the features + weight_kl * T^2 * KL with the teacher; uses no labels.

    The paper has the feature term alone, and projects feature maps by convolutions that stay in the student. Here
    the pooled features are projected, so that the exported student keeps its stock architecture.
    """

    class Config(SoftenedConfig):
        """The teacher's classifier on features trained to be the teacher's."""

        uses_labels: ClassVar[bool] = False
        weight_feature: NonNegative = 1.0
        """Of the mean squared difference of the features; the paper's only term."""
        weight_kl: NonNegative = 0.0
        """Of T^2 KL between the teacher's and the student's class distributions."""
        temperature: Temperature = 4.0
        """T of the KL term."""

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.weight_feature == 0 and self.weight_kl == 0:
                raise ValueError("distiller.weight_feature and distiller.weight_kl are both 0; raise one")
            if self.weight_kl == 0 and self.standardize_logits:
                raise ValueError(
                    "distiller.standardize_logits is of the KL term, which distiller.weight_kl leaves out; raise that, "
                    "or set distiller.standardize_logits=false"
                )
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config = config
        classifier = facts.teacher_classifier
        if classifier is None:
            raise InputError(
                f"the teacher {facts.teacher.name} has no linear classifier on pooled features, which distiller.name "
                "'simkd' gives to the student; use distiller.name=kd, or another teacher"
            )
        head = ReusedClassifierHead(facts.student.features, classifier.in_features, classifier.out_features)
        head.reuse(classifier)
        self.lend("_head", head)

    def head(self) -> ReusedClassifierHead:
        return self._head

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config = self.config
        feature = feature_mse(student.embedding, teacher.features)
        parts = {"feature_mse": (config.weight_feature, feature)}
        if config.weight_kl > 0:
            # The student's logits carry no gradient to its embedding.
            logits = self._head.classify(student.embedding)
            softened = (config.prepared(each) for each in (logits, teacher.logits))
            parts["soft_target_kl"] = (config.weight_kl, soft_target_kl(*softened, config.temperature))
        return sum_of_parts(parts, batch.valid)


METHOD = SimKD
