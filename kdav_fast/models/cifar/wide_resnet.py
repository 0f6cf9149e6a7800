"""Wide residual networks for 32 x 32 images (Zagoruyko and Komodakis, BMVC 2016)."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.models.cifar.layers import convolution, global_average, init_convolutions, scale_channels


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3 x 3 convolutions (He et al., Identity Mappings, ECCV 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        activated = F.relu(self.bn1(images))
        # A projected shortcut starts from the activation, an identity one from the images.
        shortcut = images if self.convShortcut is None else self.convShortcut(activated)
        residual = F.relu(self.bn2(self.conv1(activated)))
        return self.conv2(residual) + shortcut


class WideResNet(nn.Module):
    """B x 3 x H x W images to B x classes logits.

    Args:
        depth: 6n + 4 layers, n blocks in each of three stages.
        widen_factor: multiplies the stages' 16, 32, 64 channels; part of the network's published name.
        classes: K.
        width: channel multiplier of everything, the stem's 16 channels included.

    Parameter names and initialisation follow RepDistiller (Tian et al., ICLR 2020), so that its
    checkpoints load.
    """

    def __init__(self, depth: int, widen_factor: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        stem = scale_channels(16, width)
        stages = [scale_channels(count * widen_factor, width) for count in (16, 32, 64)]
        blocks = (depth - 4) // 6
        self.conv1 = convolution(3, stem, 3)
        self.block1 = _stage(blocks, stem, stages[0], stride=1)
        self.block2 = _stage(blocks, stages[0], stages[1], stride=2)
        self.block3 = _stage(blocks, stages[1], stages[2], stride=2)
        self.bn1 = nn.BatchNorm2d(stages[2])
        self.fc = nn.Linear(stages[2], classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        images = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(global_average(F.relu(self.bn1(images))))


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(inputs, outputs, stride)
    rest = (PreActivationBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))
