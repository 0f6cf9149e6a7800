"""Probabilistic knowledge transfer (Passalis, Tefas: ECCV 2018)."""

from torch import Tensor, nn

from kdav_fast.config.section import Weight
from kdav_fast.config.training import TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Progress
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms, require_images
from kdav_fast.distillers.terms.maps import require_features
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.models.outputs import Outputs

_EPS = 1e-7


def similarity_kl(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean over B^2 of k_t log((k_t + eps) / (k_s + eps)), eps = 1e-7: scalar, float64.

    k are the rows' (cosine + 1) / 2, diagonal included, divided by their sum. They differ little, and the weight is
    large: in float32 the rounding would show.

    Args:
        student: B x d; rows of padding are 0.
        teacher: B x any other width.
        valid: B booleans; B counts these.
    """
    pairs = valid[:, None] & valid
    student, teacher = (_probabilities(each.double(), pairs) for each in (student, teacher))
    log = ((teacher + _EPS) / (student + _EPS)).log()
    return (teacher * log).sum() / pairs.sum().clamp(min=1)


def _probabilities(embedding: Tensor, pairs: Tensor) -> Tensor:
    """B x B, each valid row's sum 1."""
    zero = (embedding == 0).all(1, keepdim=True)
    norm = embedding.masked_fill(zero, 1.0).norm(dim=1, keepdim=True)  # at 0 it has no gradient
    unit = embedding / (norm + _EPS)
    kernel = ((unit @ unit.T + 1) / 2).masked_fill(~pairs, 0.0)
    return kernel / kernel.sum(1, keepdim=True).masked_fill(~pairs.any(1, keepdim=True), 1.0)


class PKT(FeatureMethod):
    """weight_label * cross-entropy + weight_feature * divergence of the images' similarities as probabilities.

    On pooled features, whose widths may differ; over the batch of all processes. In the authors' code a student's row
    of zeros has no finite gradient; here it has one.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100 (RepDistiller)."""

        weight_feature: Weight = 30000.0
        """Of the divergence, a mean over B^2."""

        def check_run(self, train: TrainConfig) -> None:
            require_images(self, train, 2, "which compares images with each other")

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_features("pkt", facts.student, facts.teacher)

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        valid, *features = gather_batch(batch.valid, student.features, teacher.features)
        kl = similarity_kl(*features, valid).to(student.features.dtype)
        return {"similarity_kl": (self.config.weight_feature, kl)}


METHOD = PKT
