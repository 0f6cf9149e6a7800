"""The small networks by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from kdav_fast.models.cifar.mobilenetv2 import MobileNetV2
from kdav_fast.models.cifar.resnet import ResNet
from kdav_fast.models.cifar.shufflenetv1 import ShuffleNetV1
from kdav_fast.models.cifar.shufflenetv2 import ShuffleNetV2
from kdav_fast.models.cifar.vgg import VGG
from kdav_fast.models.cifar.wide_resnet import WideResNet

_NARROW = (16, 16, 32, 64)
_FOURFOLD = (32, 64, 128, 256)

CIFAR_NETWORKS: dict[str, Callable[[int, float], nn.Module]] = {
    "resnet8": partial(ResNet, 8, _NARROW),
    "resnet14": partial(ResNet, 14, _NARROW),
    "resnet20": partial(ResNet, 20, _NARROW),
    "resnet32": partial(ResNet, 32, _NARROW),
    "resnet56": partial(ResNet, 56, _NARROW),
    "resnet110": partial(ResNet, 110, _NARROW),
    "resnet8x4": partial(ResNet, 8, _FOURFOLD),
    "resnet32x4": partial(ResNet, 32, _FOURFOLD),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, 1),
    "vgg13": partial(VGG, 2),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}
"""Name to a constructor that takes the number of classes and the channel multiplier."""
