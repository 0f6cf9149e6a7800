"""ResNets of depth 6n + 2 for 32 x 32 images (He et al., Deep Residual Learning, CVPR 2016, section 4.2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.models.cifar.layers import convolution, global_average, init_convolutions, scale_channels


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()  # a module, which shows the map before it

    def forward(self, images: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(images)))
        residual = self.bn2(self.conv2(residual))
        return self.relu(residual + self.downsample(images))


class ResNet(nn.Module):
    """B x 3 x H x W images to B x classes logits.

    Args:
        depth: 6n + 2 layers, n blocks in each of three stages.
        channels: of the stem and the three stages; `4x` networks have 32, 64, 128, 256.
        classes: K.
        width: channel multiplier of stem and stages.

    Parameter names and initialisation follow Tian et al., Contrastive Representation Distillation, ICLR 2020
    (RepDistiller), so that its checkpoints load.
    """

    def __init__(
        self, depth: int, channels: tuple[int, int, int, int], classes: int, width: float = 1.0
    ) -> None:
        super().__init__()
        stem, *stages = (scale_channels(count, width) for count in channels)
        self.conv1 = convolution(3, stem, 3)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(blocks, stem, stages[0], stride=1)
        self.layer2 = _stage(blocks, stages[0], stages[1], stride=2)
        self.layer3 = _stage(blocks, stages[1], stages[2], stride=2)
        self.fc = nn.Linear(stages[2], classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        images = F.relu(self.bn1(self.conv1(images)))
        images = self.layer3(self.layer2(self.layer1(images)))
        return self.fc(global_average(images))


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
