"""Contrastive representation distillation (Tian, Krishnan, Isola: ICLR 2020)."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Fraction, Weight, Width, within
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid
from kdav_fast.distillers.memories.gather import Gathering
from kdav_fast.distillers.memories.negatives import Negatives, OtherClasses
from kdav_fast.distillers.memories.sample import SampleMemory, width_remedy
from kdav_fast.distillers.terms.contrast import Embed, noise_contrast
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import require_features
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs


class CRD(FeatureMethod):
    """weight_label * cross-entropy + weight_feature * (contrast of the student's anchor + of the teacher's anchor).

    With P = exp(<memory of the other network, z> / T) / Z the loss of an anchor is `noise_contrast`; positive is an
    image's own entry, made when it was seen last, negatives are of other classes. Z is the mean exponential of the
    first batch times N, and constant from then on. Afterwards the entries become unit(momentum m + (1 - momentum) z).
    The teacher's anchor trains the teacher's embedding alone.

    The authors' code draws each image's negatives by itself, and knows one process; here the images of a step share a
    permutation (`memories/negatives.py`), and all processes' entries are remembered.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100; the same for ImageNet (SimKD's code). "CRD+KD": weight_kl 1."""

        takes_mixed: ClassVar[bool] = False
        weight_feature: Weight = 0.8
        """Of both anchors' contrast."""
        negatives: Negatives = 16384
        """K, an image; where fewer are of other classes, these count as often."""
        contrast_temperature: Annotated[
            float, within(0.03, 1000.0, "exponentials of cosines / T must fit float32")
        ] = 0.07
        """T of the contrast."""
        momentum: Fraction = 0.5
        """Share of an entry that stays."""
        width: Width = 128
        """Of the embeddings, of which two for every training image are remembered."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_features("crd", facts.student, facts.teacher)
        if facts.classes < 2:
            raise InputError(
                "distiller.name 'crd' contrasts images of different classes, but the data have one class; use "
                "distiller.name=rkd"
            )
        self.images = len(facts.labels)
        self.chance = config.negatives / self.images
        self.negatives = OtherClasses(facts.labels, config.negatives, facts.seed)
        for name in ("student_memory", "teacher_memory"):
            memory = SampleMemory(
                self.images,
                config.width,
                dtype=facts.dtype,
                device=facts.device,
                remedy=width_remedy(config.width),
            )
            memory.begin_uniform(math.sqrt(3 / config.width))
            setattr(self, name, memory)
        self.register_buffer("student_z", torch.zeros((), dtype=torch.float64))
        self.register_buffer("teacher_z", torch.zeros((), dtype=torch.float64))
        self.lend("_embed_s", Embed(facts.student.features, config.width))
        self.lend("_embed_t", Embed(facts.teacher.features, config.width))

    def remarks(self) -> Sequence[str]:
        others, wanted = self.negatives.fewest, self.config.negatives
        if others >= wanted:
            return ()
        return (
            f"note: distiller.negatives is {wanted}, but as few as {others} of {self.images} training images are of "
            "other classes: each counts as often as so many draws with replacement would draw it",
        )

    def learned(self) -> dict[str, Learned]:
        return {"embed_s": Learned(self._embed_s), "embed_t": Learned(self._embed_t)}

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        z_s, z_t = learned["embed_s"](student.features), learned["embed_t"](teacher.features)
        others = self.negatives.draw(batch.labels, progress.step)
        anchors = {
            "student_anchor": self._anchor(z_s, self.teacher_memory, self.student_z, batch, others),
            "teacher_anchor": self._anchor(z_t, self.student_memory, self.teacher_z, batch, others),
        }
        self._remember(self.student_memory, batch, z_s)
        self._remember(self.teacher_memory, batch, z_t)
        weight = self.config.weight_feature
        return {name: (weight, mean_over_valid(rows, batch.valid)) for name, rows in anchors.items()}

    def _anchor(
        self, z: Tensor, memory: SampleMemory, normalizer: Tensor, batch: Batch, others: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The contrast of each row, B; the first time, `normalizer` is found."""
        index, weight = others
        positive = torch.exp((memory.rows(batch.index) * z).sum(1) / self.config.contrast_temperature)
        negative = torch.exp(z @ memory.rows(index).T / self.config.contrast_temperature)
        with torch.no_grad():
            mean = (positive + (weight * negative).sum(1)) / (1 + self.config.negatives)
            means, valid = Gathering(mean.double(), batch.valid).rows()
            found = self.images * mean_over_valid(means, valid)
            normalizer.copy_(torch.where(normalizer > 0, normalizer, found))
        # Of a first batch without a valid image nothing counts.
        z_or_one = torch.where(normalizer > 0, normalizer, 1.0).to(z.dtype)
        return noise_contrast(positive / z_or_one, negative / z_or_one, weight, self.chance)

    def _remember(self, memory: SampleMemory, batch: Batch, z: Tensor) -> None:
        kept = self.config.momentum * memory.rows(batch.index) + (1 - self.config.momentum) * z.detach()
        memory.update(batch.index, F.normalize(kept, dim=1), batch.valid)


METHOD = CRD
