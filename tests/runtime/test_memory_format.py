"""Which layers stay in NCHW on a CPU, and that a training which used to crash runs and is right."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from kdav_fast.runtime.memory_format import guard_unsafe_layers, set_layout, unsafe_in_channels_last

CPU = torch.device("cpu")


def strides(tensor):
    return "NHWC" if tensor.stride(1) == 1 else "NCHW"


@pytest.mark.parametrize(
    ("layer", "unsafe"),
    [
        (nn.Conv2d(4, 8, 1, 2), True),
        (nn.Conv2d(15, 64, 1, (1, 2)), True),
        (nn.Conv2d(1, 1, 1, 3), True),
        (nn.Conv2d(16, 32, 1, 2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, 2, 1), False),
        (nn.Linear(4, 8), False),
    ],
)
def test_unsafe_layers(layer, unsafe):
    assert bool(unsafe_in_channels_last(nn.Sequential(layer))) == unsafe


def seen_by_layers(network, images):
    """The memory order of each convolution's images, by its name."""
    seen = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: seen.update({name: strides(inputs[0])})
            )
    network(images)
    return seen


@pytest.mark.parametrize("channels", [1, 4])
def test_only_unsafe_layers_see_other_images(channels):
    network = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 1, 2), nn.Conv2d(8, 8, 3))
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    expected = network(images)
    guard_unsafe_layers(network, "channels_last", CPU)
    set_layout(network, "channels_last", CPU)
    for averaged in (network, copy.deepcopy(network)):
        assert seen_by_layers(averaged, images) == {"0": "NHWC", "1": "NCHW", "2": "NHWC"}
        # Strides of a 1x1 weight tell the two orders apart only beyond its channels.
        assert averaged[1].weight.stride() == (channels, 1, 1, 1)
        assert strides(averaged[0].weight) == strides(averaged[2].weight) == "NHWC"
        torch.testing.assert_close(averaged(images), expected)


def test_nothing_else_is_touched():
    network = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.Conv2d(8, 8, 3))
    guard_unsafe_layers(network, "channels_last", torch.device("cuda"))
    guard_unsafe_layers(network, "contiguous", CPU)
    set_layout(network, "contiguous", CPU)
    images = torch.randn(2, 4, 16, 16)
    assert seen_by_layers(network, images) == {"0": "NCHW", "1": "NCHW"}
    assert strides(network[1].weight) == "NCHW"


STEPS = """
import torch
from kdav_fast.models import build_classifier
from kdav_fast.runtime.memory_format import guard_unsafe_layers, set_layout

torch.manual_seed(0)
network = build_classifier("cifar:resnet8", 10, width=0.25)
exact = build_classifier("cifar:resnet8", 10, width=0.25).double()
exact.load_state_dict(network.state_dict())
guard_unsafe_layers(network, "channels_last", torch.device("cpu"))
set_layout(network, "channels_last", torch.device("cpu"))
for step in range(3):
    images = torch.randn(16, 3, 64, 64)
    torch.nn.functional.cross_entropy(exact(images.double()).logits, torch.arange(16) % 10).backward()
    images = images.contiguous(memory_format=torch.channels_last)
    torch.nn.functional.cross_entropy(network(images).logits, torch.arange(16) % 10).backward()
for (name, mine), truth in zip(network.named_parameters(), exact.parameters()):
    error = (mine.grad - truth.grad).norm() / truth.grad.norm()
    assert error < 1e-2, (name, error)
print("trained")
"""


def test_a_small_student_trains_on_large_images():
    """In a child: with the layers unguarded, this dies of a segmentation fault on a CPU with AVX-512."""
    result = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout == "trained\n", (result.returncode, result.stderr[-2000:])
