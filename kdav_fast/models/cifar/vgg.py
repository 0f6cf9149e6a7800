"""VGG with BatchNorm and one linear layer (Simonyan and Zisserman, ICLR 2015; Tian et al., ICLR 2020)."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.errors import InputError
from kdav_fast.models.cifar.layers import global_average, init_convolutions, scale_channels

SMALLEST_IMAGE = 8
"""Pixels a side: three poolings halve the image before the last blocks."""


class VGG(nn.Module):
    """B x 3 x H x W images, 8 pixels or more a side, to B x classes logits.

    Args:
        convolutions: in each of five blocks: 1 for vgg8; 2 for vgg13.
        classes: K.
        width: channel multiplier.

    Three poolings stand between the blocks and a fourth for images of 64 pixels or more. Parameter names and
    initialisation follow RepDistiller (Tian et al., ICLR 2020), so that its checkpoints load.

    Raises:
        InputError: from `forward`, for an image too small to be pooled.
    """

    def __init__(self, convolutions: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = [3, *(scale_channels(count, width) for count in (64, 128, 256, 512, 512))]
        for index, (inputs, outputs) in enumerate(pairwise(channels)):
            self.add_module(f"block{index}", _block(convolutions, inputs, outputs))
        self.classifier = nn.Linear(channels[-1], classes)
        init_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        side = min(images.shape[-2:])
        if side < SMALLEST_IMAGE:
            raise InputError(
                f"a vgg network was given images of {images.shape[-2]} x {images.shape[-1]} pixels; it pools "
                f"three times and needs {SMALLEST_IMAGE} or more a side: use larger images or a resnet"
            )
        images = F.max_pool2d(self.block0(images), 2)
        images = F.max_pool2d(self.block1(images), 2)
        images = F.max_pool2d(self.block2(images), 2)
        images = self.block3(images)
        if side >= 64:
            images = F.max_pool2d(images, 2)
        return self.classifier(global_average(self.block4(images)))


def _block(convolutions: int, inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for index in range(convolutions):
        # With a bias, useless as it is before BatchNorm: the published counts include it.
        layers.append(nn.Conv2d(inputs if index == 0 else outputs, outputs, 3, padding=1))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
