"""What the small networks share: channel widths and the initialisation of their literature."""

import math

from torch import Tensor, nn


def scale_channels(channels: int, width: float, multiple: int = 1) -> int:
    """`channels * width` rounded to a multiple, at least one of them; `width` 1 changes nothing published."""
    return multiple * max(1, round(channels * width / multiple))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias that keeps the image's size at stride 1; a BatchNorm follows it."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def init_convolutions(network: nn.Module) -> None:
    """Normal with variance 2 / (kernel area * output channels), the ResNets' initialisation.

    Source: He et al., Delving Deep into Rectifiers, ICCV 2015, the fan-out form. BatchNorm needs nothing:
    torch starts it at weight 1 and bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # Written out: a depthwise convolution counts all its output channels here, as published.
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def global_average(images: Tensor) -> Tensor:
    """B x C x H x W to B x C: the published fixed windows at 32 x 32, and any other size too."""
    return images.mean(dim=(2, 3))
