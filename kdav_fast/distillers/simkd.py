"""SimKD: the teacher's classifier on aligned features (Chen, Mei, Zhang, Wang, Feng, Chen: CVPR 2022)."""

from typing import ClassVar, Self

from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.section import Count, Temperature, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Learned, Losses, Progress, sum_of_parts, widened
from kdav_fast.distillers.terms.maps import check_common_height, one_stage, row_mse, to_common_height
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import ReusedClassifierHead


def feature_mse(student_embedding: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over the d features of the squared difference, of each row of two B x d tensors: B. Halves are widened."""
    return (widened(student_embedding) - widened(teacher_features)).square().mean(1)


def map_mse(projector: nn.Module, student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean over C, H, W of (projector(F_s) - F_t)^2, of each row: B; the paper's. Halves are widened.

    The higher map is average-pooled to a square of the other's height before.
    """
    student_map, teacher_map = to_common_height(student_map, teacher_map)
    return row_mse(projector(student_map), teacher_map)


def map_projector(narrow: int, wide: int, factor: int) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolutions, each with BatchNorm and ReLU, `wide` / `factor` channels between them."""
    mid = max(wide // factor, 1)
    first = nn.Conv2d(narrow, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU()
    second = nn.Conv2d(mid, mid, 3, padding=1, bias=False), nn.BatchNorm2d(mid), nn.ReLU()
    return nn.Sequential(
        *first, *second, nn.Conv2d(mid, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()
    )


class SimKD(Distiller):
    """weight_feature * MSE of the features + weight_kl * T^2 * KL with the teacher; uses no labels.

    The paper has one term, and projects feature maps by convolutions that stay in the student. They fold into nothing:
    here the pooled features are projected, so that the exported student keeps its stock architecture, and the paper's
    term may be added with a projector that is not exported. It ends in ReLU, as the teacher's map must.
    """

    class Config(SoftenedConfig):
        """The teacher's classifier on features trained to be the teacher's."""

        uses_labels: ClassVar[bool] = False
        weight_feature: Weight = 1.0
        """Of the mean squared difference of the pooled features."""
        weight_kl: Weight = 0.0
        """Of T^2 KL between the teacher's and the student's class distributions."""
        temperature: Temperature = 4.0
        """T of the KL term."""
        weight_map: Weight = 0.0
        """Of the mean squared difference of the last feature maps, the paper's only term."""
        factor: Count = 2
        """By which the maps' projector has fewer channels between its ends than the teacher's map."""

        @property
        def needs_stages(self) -> bool:
            return self.weight_map > 0

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
        self.lend("_projector", None)
        if config.needs_stages:
            pair = one_stage(facts, "simkd", -1)
            check_common_height("simkd", pair)
            if config.factor > pair.teacher[0]:
                raise InputError(
                    f"distiller.factor is {config.factor}, but the teacher's map has {pair.teacher[0]} channels to "
                    f"divide by it; allowed: 1 to {pair.teacher[0]}"
                )
            self.lend("_projector", map_projector(pair.student[0], pair.teacher[0], config.factor))

    def learned(self) -> dict[str, Learned]:
        return {} if self._projector is None else {"projector": Learned(self._projector)}

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
        if config.weight_map > 0:
            rows = map_mse(learned["projector"], student.stages[-1], teacher.stages[-1])
            parts["map_mse"] = (config.weight_map, rows)
        return sum_of_parts(parts, batch.valid)


METHOD = SimKD
