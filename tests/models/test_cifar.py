"""The small networks: published sizes, image sizes, widths and initialisation."""

import math

import pytest
import torch
from torch import nn

from kdav_fast.errors import InputError
from kdav_fast.models.cifar import CIFAR_NETWORKS

# Trainable parameters for 100 classes, as published with CRD (RepDistiller) and the methods after it.
PUBLISHED_PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
# The deep ones differ from these in repetitions only.
ONE_OF_EACH_FAMILY = ("resnet8", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2")


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_every_network_has_a_published_count():
    assert CIFAR_NETWORKS.keys() == PUBLISHED_PARAMETERS.keys()


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_parameters_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        assert count_parameters(CIFAR_NETWORKS[name](100, 1.0)) == parameters


@pytest.mark.parametrize("size", [8, 16, 32, 33])
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_small_and_odd_images(name, size):
    network = CIFAR_NETWORKS[name](7, 1.0)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("width", [0.125, 0.3, 0.5, 1.7, 2.0])
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_every_width_works(name, width):
    assert CIFAR_NETWORKS[name](5, width).eval()(torch.randn(1, 3, 16, 16)).shape == (1, 5)


def test_width_multiplies_every_stage():
    network = CIFAR_NETWORKS["resnet14"](10, 2.0)
    stages = (network.layer1, network.layer2, network.layer3)
    assert [network.conv1.out_channels, *(stage[-1].conv2.out_channels for stage in stages)] == [
        32,
        32,
        64,
        128,
    ]


def test_half_width_shrinks_the_network():
    with torch.device("meta"):
        for name in PUBLISHED_PARAMETERS:
            half, whole = (count_parameters(CIFAR_NETWORKS[name](10, width)) for width in (0.5, 1.0))
            assert half < 0.6 * whole, name


def test_vgg_refuses_an_image_it_would_pool_to_nothing():
    network = CIFAR_NETWORKS["vgg8"](10, 0.25)
    with pytest.raises(InputError, match=r"7 x 9 pixels.*8 or more") as error:
        network(torch.randn(1, 3, 7, 9))
    assert "\n" not in str(error.value)


def test_vgg_pools_a_fourth_time_from_64_pixels_on():
    network = CIFAR_NETWORKS["vgg8"](10, 0.25).eval()
    seen = {}
    network.block4.register_forward_hook(lambda module, inputs, output: seen.update(size=output.shape[-1]))
    for size, expected in ((32, 4), (63, 7), (64, 4)):
        network(torch.randn(1, 3, size, size))
        assert seen["size"] == expected


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "mobilenetv2"])
def test_convolutions_start_with_fan_out_variance(name):
    torch.manual_seed(0)
    for module in CIFAR_NETWORKS[name](10, 1.0).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            expected = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)


def test_channels_last_changes_nothing():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    for name in ONE_OF_EACH_FAMILY:
        network = CIFAR_NETWORKS[name](10, 0.5).eval()
        expected = network(images)
        given = network.to(memory_format=torch.channels_last)(
            images.contiguous(memory_format=torch.channels_last)
        )
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5, msg=name)
