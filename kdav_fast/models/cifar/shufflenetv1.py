"""ShuffleNet with 3 groups for 32 x 32 images (Zhang et al., CVPR 2018; Tian et al., ICLR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.models.cifar.layers import convolution, global_average, scale_channels

GROUPS = 3
STEM = 24
STAGES = ((240, 4), (480, 8), (960, 4))
BOTTLENECK = 4


class ShuffleUnit(nn.Module):
    """Grouped bottleneck with a channel shuffle; at stride 2 the pooled input is appended to its output."""

    def __init__(self, inputs: int, outputs: int, stride: int, first_groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.first_groups = first_groups
        computed = outputs - inputs if stride == 2 else outputs
        hidden = computed // BOTTLENECK
        self.conv1 = convolution(inputs, hidden, 1, groups=first_groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = convolution(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = convolution(hidden, computed, 1, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(computed)
        self.relu = nn.ReLU()  # a module, which shows the map before it

    def forward(self, images: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(images)))
        if self.first_groups > 1:
            residual = F.channel_shuffle(residual, self.first_groups)
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        if self.stride == 2:
            return self.relu(torch.cat([residual, F.avg_pool2d(images, 3, stride=2, padding=1)], dim=1))
        return self.relu(residual + images)


class ShuffleNetV1(nn.Module):
    """B x 3 x H x W images to B x classes logits.

    Args:
        classes: K.
        width: channel multiplier; channels are rounded to multiples of 12, so that 3 groups divide a
            bottleneck of a quarter.

    Parameter names and initialisation (torch's own) follow RepDistiller (Tian et al., ICLR 2020), so that its
    checkpoints load.
    """

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        inputs = scale_channels(STEM, width, BOTTLENECK * GROUPS)
        self.conv1 = convolution(3, inputs, 1)
        self.bn1 = nn.BatchNorm2d(inputs)
        for stage, (channels, count) in enumerate(STAGES, start=1):
            outputs = scale_channels(channels, width, BOTTLENECK * GROUPS)
            # The paper leaves the first pointwise layer ungrouped: it has few input channels.
            units = [ShuffleUnit(inputs, outputs, 2, first_groups=1 if stage == 1 else GROUPS)]
            units += [ShuffleUnit(outputs, outputs, 1, first_groups=GROUPS) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*units))
            inputs = outputs
        self.linear = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        images = F.relu(self.bn1(self.conv1(images)))
        images = self.layer3(self.layer2(self.layer1(images)))
        return self.linear(global_average(images))
