"""Knowledge diffusion for distillation (Huang, Zhang, Zheng, You, Wang, Qian, Xu: NeurIPS 2023)."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kdav_fast.config.section import Count, NonNegative, Temperature
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import one_stage, row_mse, unlike
from kdav_fast.distillers.terms.noise import normal_rows, whole_rows
from kdav_fast.distillers.terms.softened import soft_target_kl
from kdav_fast.models.outputs import Outputs

_TIMES = 1000
_EMBEDDED_TIMES = 1280


def signal_shares() -> Tensor:
    """a_t: the product of 1 - beta to t, betas linear from 1e-4 to 0.02: 1000, float64."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, _TIMES, dtype=torch.float64), dim=0)


class Bottleneck(nn.Module):
    """x + BN(conv1x1(ReLU(BN(conv3x3(ReLU(BN(conv1x1(x))))))))."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        mid = max(width // reduction, 1)
        first = nn.Conv2d(width, mid, 1), nn.BatchNorm2d(mid), nn.ReLU()
        second = nn.Conv2d(mid, mid, 3, padding=1), nn.BatchNorm2d(mid), nn.ReLU()
        self.block = nn.Sequential(*first, *second, nn.Conv2d(mid, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Denoiser(nn.Module):
    """The noise in x at time t: of maps by two bottlenecks, of vectors by 1x1 convolutions."""

    def __init__(self, width: int, maps: bool) -> None:
        super().__init__()
        self.time_embedding = nn.Embedding(_EMBEDDED_TIMES, width)
        if maps:
            layers = [
                Bottleneck(width, 4),
                Bottleneck(width, 4),
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
            ]
        else:
            layers = [*_wide(width, 4), nn.BatchNorm2d(width), *_wide(width, 4)]
        self.pred = nn.Sequential(*layers)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.pred(x + self.time_embedding(time)[:, :, None, None])


class NoiseAdapter(nn.Module):
    """How much of the student's x is signal, B."""

    def __init__(self, width: int, maps: bool) -> None:
        super().__init__()
        layers = (
            [Bottleneck(width, 8), nn.AdaptiveAvgPool2d(1)]
            if maps
            else [*_wide(width, 2), nn.BatchNorm2d(width)]
        )
        self.feat, self.pred = nn.Sequential(*layers), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pred(self.feat(x).flatten(1)).softmax(1)[:, 0]


class Autoencoder(nn.Module):
    """The teacher's map in fewer channels, and back."""

    def __init__(self, width: int, mid: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(width, mid, 1), nn.BatchNorm2d(mid))
        self.decoder = nn.Sequential(nn.Conv2d(mid, width, 1))


class Noises(NamedTuple):
    """What is random in a branch."""

    student: Tensor
    teacher: Tensor
    time: Tensor
    """B, of the teacher's."""


class Diffusion(nn.Module):
    """A branch: a denoiser that learns the teacher's map, and the student's map denoised by it.

    Args:
        narrow: channels of the student's map.
        wide: of the teacher's.
        mid: of the autoencoder's; None without one.
        maps: else the maps are 1 x 1.
        steps: of denoising.
    """

    def __init__(self, narrow: int, wide: int, mid: int | None, maps: bool, steps: int) -> None:
        super().__init__()
        self.width, stride = mid or wide, _TIMES // (2 * steps)
        if mid is not None:
            self.ae = Autoencoder(wide, mid)
        self.trans = nn.Conv2d(narrow, self.width, 1)
        self.model, self.noise_adapter = Denoiser(self.width, maps), NoiseAdapter(self.width, maps)
        self.proj = nn.Sequential(nn.Conv2d(self.width, self.width, 1), nn.BatchNorm2d(self.width))
        self.register_buffer("shares", signal_shares(), persistent=False)
        shares = signal_shares().tolist()
        self.times = [stride * step for step in reversed(range(steps))]
        self.schedule = [shares[time] for time in self.times] + [1.0]

    def forward(
        self, student: Tensor, teacher: Tensor, noises: Noises
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The student's map denoised, its target, the noise found in the teacher's, the teacher's map decoded."""
        target, decoded = teacher, None
        if hasattr(self, "ae"):
            encoded = self.ae.encoder(teacher)
            target, decoded = encoded.detach(), self.ae.decoder(encoded)
        share = self.shares[noises.time].to(noises.teacher.dtype)[:, None, None, None]
        noisy = share.sqrt() * target + (1 - share).sqrt() * noises.teacher
        found = self.model(noisy, noises.time)
        x = self.trans(student)
        gate = self.noise_adapter(x)[:, None, None, None]
        return self.proj(self.denoised(gate * x + (1 - gate) * noises.student)), target, found, decoded

    def denoised(self, x: Tensor) -> Tensor:
        """DDIM without new noise (Song, Meng, Ermon 2021), through the last half of as many even steps."""
        for time, share, following in zip(self.times, self.schedule, self.schedule[1:], strict=False):
            noise = self.model(x, torch.full((len(x),), time, device=x.device))
            signal = (x - (1 - share) ** 0.5 * noise) / share**0.5
            x = following**0.5 * signal + (1 - following) ** 0.5 * noise
        return x


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
        weight_feature: NonNegative = 1.0
        """Of the three terms on maps."""
        weight_logit: NonNegative = 1.0
        """Of the two terms on logits."""
        logit_temperature: Temperature = 1.0
        """T of the KL between the teacher's and the denoised logits."""
        autoencoder: bool = True
        """Compare maps in the channels of an autoencoder of the teacher's."""
        width: Count = 256
        """Its channels."""
        steps: Count = 5
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
    return Noises(first, second, whole_rows(index, *moment, 3 * branch + 2, _TIMES))


def _wide(width: int, factor: int) -> list[nn.Module]:
    wide = factor * width
    return [nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, width, 1)]


METHOD = DiffKD
