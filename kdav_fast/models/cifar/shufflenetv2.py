"""ShuffleNetV2 for 32 x 32 images (Ma et al., ECCV 2018; Tian et al., ICLR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.models.cifar.layers import convolution, global_average, scale_channels

STEM = 24
STAGES = ((116, 4), (232, 8), (464, 4))
LAST = 1024


class BasicUnit(nn.Module):
    """Half of the channels pass through, the other half is computed; a shuffle mixes them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = convolution(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = convolution(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = convolution(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, images: Tensor) -> Tensor:
        passed, computed = images.chunk(2, dim=1)
        computed = F.relu(self.bn1(self.conv1(computed)))
        computed = self.bn2(self.conv2(computed))
        computed = F.relu(self.bn3(self.conv3(computed)))
        return F.channel_shuffle(torch.cat([passed, computed], dim=1), 2)


class DownUnit(nn.Module):
    """Two strided branches over all input channels, concatenated and shuffled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = convolution(inputs, inputs, 3, stride=2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = convolution(inputs, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = convolution(inputs, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = convolution(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = convolution(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, images: Tensor) -> Tensor:
        left = self.bn1(self.conv1(images))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(images)))
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return F.channel_shuffle(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(nn.Module):
    """B x 3 x H x W images to B x classes logits.

    Args:
        classes: K.
        width: channel multiplier; stages are rounded to even channels, whose halves the units split.

    Parameter names and initialisation (torch's own) follow RepDistiller (Tian et al., ICLR 2020), so that its
    checkpoints load.
    """

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        inputs = scale_channels(STEM, width)
        self.conv1 = convolution(3, inputs, 1)
        self.bn1 = nn.BatchNorm2d(inputs)
        for stage, (channels, count) in enumerate(STAGES, start=1):
            outputs = scale_channels(channels, width, 2)
            units = [DownUnit(inputs, outputs), *(BasicUnit(outputs) for _ in range(count - 1))]
            self.add_module(f"layer{stage}", nn.Sequential(*units))
            inputs = outputs
        last = scale_channels(LAST, width)
        self.conv2 = convolution(inputs, last, 1)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        images = F.relu(self.bn1(self.conv1(images)))
        images = self.layer3(self.layer2(self.layer1(images)))
        return self.linear(global_average(F.relu(self.bn2(self.conv2(images)))))
