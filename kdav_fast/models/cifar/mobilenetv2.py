"""MobileNetV2 of half width for 32 x 32 images (Sandler et al., CVPR 2018; Tian et al., ICLR 2020)."""

from torch import Tensor, nn

from kdav_fast.models.cifar.layers import convolution, global_average, init_convolutions, scale_channels

EXPANSION = 6
# Channels at the published half width, blocks, stride of the first block. The second stage keeps the
# image's size, where the network for ImageNet halves it.
STAGES = ((8, 1, 1), (12, 2, 1), (16, 3, 2), (32, 4, 2), (48, 3, 1), (80, 3, 2), (160, 1, 1))
STEM = 16
LAST = 1280


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise, linear 1 x 1 projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *_normalized(convolution(inputs, hidden, 1)),
            *_normalized(convolution(hidden, hidden, 3, stride, groups=hidden)),
            convolution(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, images: Tensor) -> Tensor:
        return images + self.conv(images) if self.shortcut else self.conv(images)


class MobileNetV2(nn.Module):
    """B x 3 x H x W images to B x classes logits: width multiplier 0.5, expansion 6.

    Args:
        classes: K.
        width: channel multiplier on top of the published half width. As in the paper, the last convolution
            keeps its 1280 channels until the network is wider than the full MobileNetV2 (`width` above 2).

    ReLU instead of ReLU6, an expansion also in the first block, parameter names and initialisation follow
    RepDistiller (Tian et al., ICLR 2020), so that its checkpoints load.
    """

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        inputs = scale_channels(STEM, width)
        self.conv1 = nn.Sequential(*_normalized(convolution(3, inputs, 3, stride=2)))
        self.blocks = nn.ModuleList()
        for stage, (channels, count, stride) in enumerate(STAGES):
            outputs = scale_channels(channels, width)
            expansion = 1 if stage == 0 else EXPANSION
            blocks = [InvertedResidual(inputs, outputs, stride, expansion)]
            blocks += [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(count - 1)]
            self.blocks.append(nn.Sequential(*blocks))
            inputs = outputs
        last = scale_channels(LAST, max(1.0, width / 2))
        self.conv2 = nn.Sequential(*_normalized(convolution(inputs, last, 1)))
        self.classifier = nn.Sequential(nn.Linear(last, classes))
        init_convolutions(self)
        nn.init.normal_(self.classifier[0].weight, std=0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def forward(self, images: Tensor) -> Tensor:
        images = self.conv1(images)
        for stage in self.blocks:
            images = stage(images)
        return self.classifier(global_average(self.conv2(images)))


def _normalized(layer: nn.Conv2d) -> tuple[nn.Module, ...]:
    return layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True)
