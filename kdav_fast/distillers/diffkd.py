"""Knowledge diffusion for distillation (Huang, Zhang, Zheng, You, Wang, Qian, Xu: NeurIPS 2023)."""

from typing import Annotated, ClassVar

from torch import Tensor, nn

from kdav_fast.config.section import Temperature, Weight, Width, within
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid, widened
from kdav_fast.distillers.terms.diffusion import TIMES, Diffusion, Noises
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import one_stage, row_mse, unlike
from kdav_fast.distillers.terms.noise import normal_rows, whole_rows
from kdav_fast.distillers.terms.softened import soft_target_kl
from kdav_fast.models.outputs import Outputs


class DiffKD(FeatureMethod):
    """weight_label * cross-entropy + a branch on the last feature map + a branch on the logits.

    The student's features are taken for noisy ones of the teacher: a small diffusion model learns to denoise the
    teacher's (diffusion term; autoencoder term) and then denoises the student's, which are compared with the teacher's:
    maps by their mean squared difference, logits by KL. Noise and times are drawn by seed, step and
    image (`terms/noise.py`). In the authors' code student and noise are mixed linearly by a learned gate, not with
    square roots, and so are they here.
    """

    class Config(FeatureConfig):
        """Published for ImageNet and ResNets with width 1024; there is no setting for CIFAR-100."""

        needs_stages: ClassVar[bool] = True
        weight_feature: Weight = 1.0
        """Of the three terms on maps."""
        weight_logit: Weight = 1.0
        """Of the two terms on logits."""
        logit_temperature: Temperature = 1.0
        """T of the KL between the teacher's and the denoised logits."""
        autoencoder: bool = True
        """Compare maps in the channels of an autoencoder of the teacher's."""
        width: Width = 256
        """Its channels."""
        steps: Annotated[
            int, within(1, TIMES // 2, "they divide half of 1000 times, a pass of the denoiser each")
        ] = 5
        """Of denoising."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        pair = one_stage(facts, "diffkd", -1)
        if pair.student[1:] != pair.teacher[1:]:
            raise unlike("diffkd", pair, "but it compares maps of one height and width")
        self.seed = facts.seed
        mid = config.width if config.autoencoder else None
        self.lend("_feature", Diffusion(pair.student[0], pair.teacher[0], mid, True, config.steps))
        self.lend("_logit", Diffusion(facts.classes, facts.classes, None, False, config.steps))

    def learned(self) -> dict[str, Learned]:
        return {"feature": Learned(self._feature), "logit": Learned(self._logit)}

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        config, rows = self.config, {}
        maps = widened(student.stages[-1]), widened(teacher.stages[-1])
        vectors = tuple(outputs.logits[:, :, None, None] for outputs in (student, teacher))
        for number, (name, (one, other)) in enumerate({"feature": maps, "logit": vectors}.items()):
            width = learned[name].width
            noises = draw(batch.index, (self.seed, progress.step), number, (width, *other.shape[2:]))
            refined, target, found, decoded = learned[name](one, other, noises)
            rows[f"{name}_diffusion"] = row_mse(found, noises.teacher)
            if decoded is not None:
                rows[f"{name}_autoencoder"] = row_mse(decoded, other)
            if name == "feature":
                rows["feature_distill"] = row_mse(refined, target)
            else:
                pair = refined.flatten(1), target.flatten(1)
                rows["logit_distill"] = soft_target_kl(*pair, config.logit_temperature)
        weights = {"feature": config.weight_feature, "logit": config.weight_logit}
        return {
            name: (weights[name.split("_")[0]], mean_over_valid(row, batch.valid))
            for name, row in rows.items()
        }


def draw(index: Tensor, moment: tuple[int, int], branch: int, shape: tuple[int, ...]) -> Noises:
    """A branch's noise for a batch of images, at a run's seed and step."""
    first, second = (normal_rows(index, *moment, 3 * branch + stream, shape) for stream in (0, 1))
    return Noises(first, second, whole_rows(index, *moment, 3 * branch + 2, TIMES))


METHOD = DiffKD
