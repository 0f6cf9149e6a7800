"""Wasserstein contrastive representation distillation (Chen, Wang, Gan, Liu, Henao, Carin: CVPR 2021), derived."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Weight, Width, within
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid, widened
from kdav_fast.distillers.memories.negatives import Negatives, OtherClasses
from kdav_fast.distillers.memories.sample import SampleMemory, width_remedy
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import require_features
from kdav_fast.distillers.terms.spectral import largest_singular_value
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.models.outputs import Outputs

_NOTHING = -1e9
"""Logarithm of the mass of a row of padding: with minus infinity its gradients would be no numbers."""


def dual_wasserstein(
    student: Tensor, teacher: Tensor, negative: Tensor, weight: Tensor, negative_weight: float = 1.0
) -> Tensor:
    """-(<z_t, z_s> - w * mean over negatives of <z_m, z_s>) of each row, B (Kantorovich-Rubinstein).

    Args:
        student: z_s, B x d, of length 1.
        teacher: z_t, the same.
        negative: z_m, M x d.
        weight: how often each of these counts, B x M; where none does, the row has no negative part.
        negative_weight: w.
    """
    scores = (weight * (student @ negative.T)).sum(1) / weight.sum(1).clamp(min=1)
    return negative_weight * scores - (student * teacher).sum(1)


def transport_cost(
    student: Tensor, teacher: Tensor, valid: Tensor, epsilon: float, rounds: int, through_plan: bool = False
) -> Tensor:
    """sum of plan * C, C_ij = 1 - <z_t_i, z_s_j>: scalar; rows are the teacher's.

    Args:
        student: z_s, B x d, of length 1; rows of padding are 0.
        teacher: z_t, the same.
        valid: B booleans.
        epsilon: of `sinkhorn_plan`.
        rounds: of `sinkhorn_plan`.
        through_plan: whether the plan has a gradient, too.
    """
    cost = 1 - teacher @ student.T
    plan = sinkhorn_plan(cost if through_plan else cost.detach(), valid, epsilon, rounds)
    return (plan * cost).sum()


def sinkhorn_plan(cost: Tensor, valid: Tensor, epsilon: float, rounds: int) -> Tensor:
    """The entropic transport plan between two uniform distributions of the valid rows: B x B, 0 for others.

    Args:
        cost: B x B.
        valid: B booleans, of rows and of columns.
        epsilon: of the entropy.
        rounds: from potentials 0 on, each of which updates rows, then columns.
    """
    mass = torch.where(valid, -valid.sum().clamp(min=1).to(cost.dtype).log(), _NOTHING)
    kernel, g = -cost / epsilon, torch.where(valid, 0.0, _NOTHING).to(cost.dtype)
    f = g
    for _ in range(rounds):
        f = mass - (kernel + g).logsumexp(1)
        g = mass - (kernel + f[:, None]).logsumexp(0)
    return (kernel + f[:, None] + g).exp().masked_fill(~(valid[:, None] & valid), 0.0)


class Head(nn.Linear):
    """z = unit((W / sigma_max(W)) h + b), the largest singular value exact and differentiated through."""

    def forward(self, features: Tensor) -> Tensor:
        weight = self.weight / largest_singular_value(self.weight)
        return F.normalize(widened(F.linear(features, weight, self.bias)), dim=1)


class WCoRD(FeatureMethod):
    """weight_label * cross-entropy + weight_global * dual term + weight_local * primal term. **Derived**.

    There is no public code, and of the paper only the abstract could be read: the dual form of the Wasserstein distance
    for global transfer as a contrast with negatives, the primal form for local transfer within the batch. All else is
    our reading: the critic <z_t, z_s>, made 1-Lipschitz by the heads' spectral normalisation; negatives as in CRD, from
    the embeddings that the teacher's head gave other classes' images when they were seen last, and none of images not
    seen yet; a Sinkhorn plan with a cosine cost over the batch of all processes, held constant; the weights.
    """

    class Config(FeatureConfig):
        """Weights as recalled from the paper, the number of negatives and the width as in CRD."""

        takes_mixed: ClassVar[bool] = False
        weight_global: Weight = 0.8
        """Of the dual term."""
        weight_local: Weight = 0.05
        """Of the primal term."""
        negatives: Negatives = 16384
        """An image, of other classes."""
        negative_weight: Weight = 1.0
        """Of the mean over negatives; their number, where each shall count as much as the positive."""
        epsilon: Annotated[float, within(0.001, 1000.0, "costs / epsilon must fit float32")] = 0.05
        """Of the transport's entropy."""
        rounds: Annotated[int, within(1, 1000, "each is two passes over B x B costs at every step")] = 50
        """Of Sinkhorn's iteration."""
        through_plan: bool = False
        """Differentiate through the rounds, too."""
        width: Width = 128
        """Of the embeddings, of which one for every training image is remembered."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_features("wcord", facts.student, facts.teacher)
        self.negatives = OtherClasses(facts.labels, config.negatives, facts.seed)
        self.memory = SampleMemory(
            len(facts.labels),
            config.width,
            dtype=facts.dtype,
            device=facts.device,
            remedy=width_remedy(config.width),
        )
        self.lend("_head_s", Head(facts.student.features, config.width))
        self.lend("_head_t", Head(facts.teacher.features, config.width))

    def learned(self) -> dict[str, Learned]:
        return {"head_s": Learned(self._head_s), "head_t": Learned(self._head_t)}

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        config = self.config
        z_s, z_t = learned["head_s"](student.features), learned["head_t"](teacher.features)
        index, weight = self.negatives.draw(batch.labels, progress.step)
        weight = weight * self.memory.seen(index)
        rows = dual_wasserstein(z_s, z_t, self.memory.rows(index), weight, config.negative_weight)
        self.memory.update(batch.index, z_t.detach(), batch.valid)
        valid, *everyone = gather_batch(batch.valid, z_s, z_t)
        local = transport_cost(*everyone, valid, config.epsilon, config.rounds, config.through_plan)
        return {
            "dual_wasserstein": (config.weight_global, mean_over_valid(rows, batch.valid)),
            "transport_cost": (config.weight_local, local),
        }


METHOD = WCoRD
