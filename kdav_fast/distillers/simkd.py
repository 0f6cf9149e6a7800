"""SimKD: the teacher's classifier on aligned features (Chen, Mei, Zhang, Wang, Feng, Chen: CVPR 2022)."""

from torch import Tensor, nn

from kdav_fast.config import SimKDConfig
from kdav_fast.distillers.base import Distiller, Losses, Target, mean_over_valid, widened
from kdav_fast.distillers.kd import soft_target_kl
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import ReusedClassifierHead


def feature_mse(student_embedding: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over the d features of the squared difference, of each row of two B x d tensors: B. Halves are widened."""
    return (widened(student_embedding) - widened(teacher_features)).square().mean(1)


class SimKDDistiller(Distiller):
    """weight_feature * MSE of the features + weight_kl * T^2 * KL with the teacher; uses no labels.

    The paper has the feature term alone, and projects feature maps by convolutions that stay in the student. Here
    the pooled features are projected, so that the exported student keeps its stock architecture.
    """

    def __init__(self, config: SimKDConfig, *, student_width: int, teacher_classifier: nn.Linear) -> None:
        super().__init__()
        self.weight_feature, self.weight_kl = config.weight_feature, config.weight_kl
        self.temperature = config.temperature
        head = ReusedClassifierHead(
            student_width, teacher_classifier.in_features, teacher_classifier.out_features
        )
        head.reuse(teacher_classifier)
        # The head is trained, sharded and saved as a part of the student: registered there, not here.
        object.__setattr__(self, "head", head)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> Losses:
        feature = mean_over_valid(feature_mse(student.embedding, teacher.features), target.valid)
        total, parts = self.weight_feature * feature, {"feature_mse": feature.detach()}
        if self.weight_kl > 0:
            # The student's logits carry no gradient to its embedding.
            logits = self.head.classify(student.embedding)
            kl = mean_over_valid(soft_target_kl(logits, teacher.logits, self.temperature), target.valid)
            total, parts["soft_target_kl"] = total + self.weight_kl * kl, kl.detach()
        return Losses(total, parts)
