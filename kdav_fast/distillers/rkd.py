"""Relational knowledge distillation (Park, Kim, Lu, Cho: CVPR 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Weight
from kdav_fast.config.training import TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Progress, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms, require_images
from kdav_fast.distillers.terms.maps import require_features
from kdav_fast.distillers.terms.unit import unit
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.models.outputs import Outputs

_LEAST = 1e-12


def distance_huber(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean over B^2 of huber(d_s - d_t): scalar, d the rows' distances by their mean. Halves are widened.

    Args:
        student: B x d; rows of padding are 0.
        teacher: B x any other width.
        valid: B booleans; B counts these.
    """
    pairs = valid[:, None] & valid
    relations = (_distances(widened(each), pairs) for each in (student, teacher))
    return F.smooth_l1_loss(*relations, reduction="sum") / pairs.sum().clamp(min=1)


def _distances(embedding: Tensor, pairs: Tensor) -> Tensor:
    """sqrt(max(|e_i|^2 + |e_j|^2 - 2 e_i e_j, 1e-12)), divided by the mean of those above 0; 0 on the diagonal."""
    square = embedding.square().sum(1)
    squared = (square[:, None] + square - 2 * embedding @ embedding.T).clamp(min=_LEAST)
    apart = pairs & ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
    distance = squared.sqrt().masked_fill(~apart, 0.0)
    return distance / (distance.sum() / apart.sum().clamp(min=1)).clamp(min=_LEAST)


def angle_huber(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean over B^3 of huber(a_s - a_t): scalar, a_ijk the cosine of the angle at e_i. Halves are widened.

    Of degenerate triples the angle is 0. Arguments are those of `distance_huber`.
    """
    relations = (_angles(widened(each), valid) for each in (student, teacher))
    return F.smooth_l1_loss(*relations, reduction="sum") / (valid.sum() ** 3).clamp(min=1)


def _angles(embedding: Tensor, valid: Tensor) -> Tensor:
    """<u_ij, u_ik>, u_ij = unit(e_j - e_i): B x B x B, 0 wherever a row is not valid."""
    directions = unit(embedding - embedding[:, None])
    directions = directions.masked_fill(~(valid[:, None] & valid)[:, :, None], 0.0)
    return directions @ directions.transpose(1, 2)


class RKD(FeatureMethod):
    """weight_label * cross-entropy + weight_distance * distance term + weight_angle * angle term.

    On pooled features, whose widths may differ; over the batch of all processes, B x B x B values in the angle term.
    The authors train embeddings for retrieval, with weights 1 and 2, no labels, and the teacher's rows of length 1. In
    their code two equal rows of the student have gradients of the order 1e12 in the angle term; here these have none.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100 (RepDistiller)."""

        weight_distance: Weight = 25.0
        """Of the distances' difference."""
        weight_angle: Weight = 50.0
        """Of the angles' difference."""

        def check_run(self, train: TrainConfig) -> None:
            reason = "for which the distance of two images, divided by its mean, is 1, and angles need three"
            require_images(self, train, 3, reason)

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_features("rkd", facts.student, facts.teacher)

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        valid, *features = gather_batch(batch.valid, student.features, teacher.features)
        return {
            "distance": (self.config.weight_distance, distance_huber(*features, valid)),
            "angle": (self.config.weight_angle, angle_huber(*features, valid)),
        }


METHOD = RKD
