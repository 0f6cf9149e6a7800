"""A small diffusion model of the teacher's maps, which denoises the student's (Huang et al., NeurIPS 2023)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

TIMES = 1000
"""Of noise, from nearly none on."""
_EMBEDDED_TIMES = 1280


def signal_shares() -> Tensor:
    """a_t: the product of 1 - beta to t, betas linear from 1e-4 to 0.02: 1000, float64."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64), dim=0)


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
        self.width, stride = mid or wide, TIMES // (2 * steps)
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


def _wide(width: int, factor: int) -> list[nn.Module]:
    wide = factor * width
    return [nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, width, 1)]
