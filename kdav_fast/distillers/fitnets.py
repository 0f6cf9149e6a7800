"""FitNets: hints from the middle of the teacher (Romero, Ballas, Kahou, Chassang, Gatta, Bengio: ICLR 2015)."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import Pair, one_stage, row_mse, unlike
from kdav_fast.models.outputs import Outputs

hint_mse = row_mse
"""Mean over C, H, W of (r(F_s) - F_t)^2, of each row of two B x C x H x W maps: B."""


class Regressor(nn.Module):
    """r: ReLU(BN(conv)), from the student's map to one of the teacher's channels, height and width.

    From twice the height by a stride of 2, from half of it by a transposed convolution, else by a kernel that leaves
    the teacher's size, 1 x 1 where both are equal (RepDistiller's `ConvReg`).

    Raises:
        InputError: no such convolution gives the teacher's size.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        (narrow, height, width), (wide, its_height, its_width) = pair
        if height == 2 * its_height:
            self.conv, size = (
                nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
                ((height + 1) // 2, (width + 1) // 2),
            )
        elif 2 * height == its_height:
            self.conv, size = (
                nn.ConvTranspose2d(narrow, wide, 4, stride=2, padding=1),
                (2 * height, 2 * width),
            )
        elif height >= its_height and width >= its_width:
            kernel = 1 + height - its_height, 1 + width - its_width
            self.conv, size = nn.Conv2d(narrow, wide, kernel), (its_height, its_width)
        else:
            size = None
        if size != (its_height, its_width):
            raise unlike("fitnets", pair, "between which there is no regressor")
        self.bn = nn.BatchNorm2d(wide)

    def forward(self, student_map: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(student_map)))


class FitNets(FeatureMethod):
    """weight_label * cross-entropy + weight_feature * mean (r(F_s) - F_t)^2.

    As RepDistiller trains it: jointly with the labels. The authors' code (Theano) has two stages: first the student
    up to its guided layer on the hint alone, halved and summed over channels, then KD. Neither has a setting for
    ImageNet.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100 (RepDistiller): the second of three stages, weight 100."""

        needs_stages: ClassVar[bool] = True
        weight_feature: Weight = 100.0
        """Of the hint."""
        stage: int = -2
        """Which feature map of both networks, from 0, shallow to deep; -1 is the last."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.lend("_regressor", Regressor(one_stage(facts, "fitnets", config.stage)))

    def learned(self) -> dict[str, Learned]:
        return {"regressor": Learned(self._regressor)}

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        stage = self.config.stage
        rows = hint_mse(learned["regressor"](student.stages[stage]), teacher.stages[stage])
        return {"hint_mse": (self.config.weight_feature, mean_over_valid(rows, batch.valid))}


METHOD = FitNets
