"""Feature maps: those that the libraries and the papers' own code mean, exact before and after the activation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from kdav_fast.errors import InputError
from kdav_fast.models.cifar import CIFAR_NETWORKS
from tests.models.staged import assert_maps, staged

# Of timm: networks of every build, with the image's side.
TIMM = [
    ("resnet18", 64),
    ("resnetv2_50", 32),
    ("mobilenetv2_100", 64),
    ("mobilenetv3_small_050", 64),
    ("efficientnet_b0", 64),
    ("convnext_atto", 64),
    ("regnetx_002", 64),
    ("densenet121", 64),
    ("repvgg_a0", 64),
    ("levit_128s", 64),
    ("twins_svt_small", 64),
    ("vit_small_patch16_dinov3", 32),
    ("xception41", 64),
    ("ghostnet_050", 64),
    ("swin_tiny_patch4_window7_224", 64),
    ("test_vit", 64),
    ("vit_tiny_patch16_224", 32),
    ("deit_tiny_distilled_patch16_224", 32),
    ("mixer_s32_224", 64),
    ("convmixer_768_32", 28),
]

LARGE = {
    "convmixer_768_32",
    "convnext_tiny",
    "densenet121",
    "googlenet",
    "inception_v3",
    "regnet_x_400mf",
    "resnet50",
    "twins_svt_small",
    "vit_small_patch16_dinov3",
    "xception41",
}

# More of timm: convolutions of every kind, hierarchies of them and of attention, plain transformers.
MORE = [
    "cait_xxs24_224", "convit_tiny", "cs3darknet_s", "cspresnet50", "csatv2", "darknet53", "davit_tiny",
    "dla34", "dpn68", "ecaresnet26t", "edgenext_xx_small", "efficientvit_b0", "efficientvit_m0",
    "eva02_tiny_patch14_224", "fasternet_t0", "fbnetc_100", "focalnet_tiny_srf", "gernet_s",
    "gmlp_s16_224", "hgnet_tiny", "mambaout_femto", "mobilenetv4_conv_small", "mobileone_s0",
    "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "nextvit_small", "pit_ti_224", "poolformer_s12",
    "pvt_v2_b0", "rdnet_tiny", "repghostnet_050", "res2net50_14w_8s", "resmlp_12_224", "resnest14d",
    "resnext26ts", "selecsls42", "seresnet18", "shvit_s1", "skresnet18", "starnet_s1", "test_vit3",
    "tf_efficientnet_lite0", "tiny_vit_5m_224", "vgg11_bn", "visformer_tiny", "vit_tiny_r_s16_p8_224",
    "volo_d1_224", "vovnet39a", "xcit_nano_12_p16_224",
]  # fmt: skip

# Of torchvision: the nodes of its traced graph that are the maps, and those that are the maps before activation; or
# "=" where there is none, or, of the layers that the graph shows whole, the path of the activation.
TORCHVISION = {
    ("resnet18", 64): (
        "relu layer1 layer2 layer3 layer4",
        "bn1 layer1.1.add layer2.1.add layer3.1.add layer4.1.add",
    ),
    ("resnet50", 32): (
        "relu layer1 layer2 layer3 layer4",
        "bn1 layer1.2.add layer2.3.add layer3.5.add layer4.2.add",
    ),
    ("mobilenet_v2", 64): ("features.1 features.3 features.6 features.13 features.17", "= = = = ="),
    ("mobilenet_v3_small", 64): (
        "features.0 features.1 features.3 features.8 features.11",
        "=features.0.2 = = = =",
    ),
    ("efficientnet_b0", 64): ("features.1 features.2 features.3 features.5 features.7", "= = = = ="),
    ("shufflenet_v2_x0_5", 64): ("conv1 stage2 stage3 stage4", "conv1.1 = = ="),
    ("densenet121", 32): (
        "features.relu0 features.denseblock1 features.denseblock2 features.denseblock3 features.denseblock4",
        "features.norm0 = = = =",
    ),
    ("googlenet", 64): ("conv1 conv3 inception3b inception4e inception5b", "conv1.bn conv3.bn = = ="),
    ("inception_v3", 96): (
        "Conv2d_2b_3x3 Conv2d_4a_3x3 Mixed_5d Mixed_6e Mixed_7c",
        "Conv2d_2b_3x3.bn Conv2d_4a_3x3.bn = = =",
    ),
    ("squeezenet1_1", 64): ("features.1 features.4 features.7 features.12", "features.0 = = ="),
    ("convnext_tiny", 64): ("features.1 features.3 features.5 features.7", "= = = ="),
    ("regnet_x_400mf", 64): (
        "stem trunk_output.block1 trunk_output.block2 trunk_output.block3 trunk_output.block4",
        "=stem.2 trunk_output.block1.block1-0.add trunk_output.block2.block2-1.add "
        "trunk_output.block3.block3-6.add trunk_output.block4.block4-11.add",
    ),
}


def chain(images, *steps):
    maps = []
    for step in steps:
        images = step(images)
        maps.append(images)
    return maps


def published(network, images):
    """The maps of the small networks as RepDistiller's code hands them out, the last of each resolution."""
    kind = type(network).__name__
    if kind == "WideResNet":
        return chain(network.conv1(images), network.block1, network.block2, network.block3)
    if kind == "VGG":
        pool = nn.MaxPool2d(2)
        deeper = [nn.Sequential(pool, network.block1), nn.Sequential(pool, network.block2)]
        return chain(images, network.block0, *deeper, nn.Sequential(pool, network.block3, network.block4))
    if kind == "MobileNetV2":
        cuts = ((0, 2), (2, 3), (3, 5), (5, 7))
        return chain(
            network.conv1(images), *(nn.Sequential(*network.blocks[one:other]) for one, other in cuts)
        )
    stem = F.relu(network.bn1(network.conv1(images)))
    maps = chain(stem, network.layer1, network.layer2, network.layer3)
    return maps if kind == "ResNet" else [stem, *maps]


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_maps_of_the_small_networks(name):
    classifier, stock, images = staged(f"cifar:{name}", 32)
    with torch.no_grad():
        outputs = classifier(images)
        assert_maps(outputs.stages, published(stock, images))
        torch.testing.assert_close(outputs.logits, stock(images))
    assert outputs.preactivations == ()


def fast_or_slow(case):
    """Large networks are for the slow suite, unless no other is built as they are."""
    return pytest.param(*case, marks=pytest.mark.slow) if case[0] in LARGE else case


@pytest.mark.parametrize(
    ("name", "size"),
    [*map(fast_or_slow, TIMM), *(pytest.param(name, 64, marks=pytest.mark.slow) for name in MORE)],
)
def test_maps_of_timm(name, size):
    """timm's own: the last of each resolution, or of one resolution four of them."""
    classifier, stock, images = staged(f"timm:{name}", size)
    with torch.no_grad():
        maps = stock.forward_intermediates(images, intermediates_only=True)
        outputs = classifier(images)
        torch.testing.assert_close(outputs.logits, stock(images))
    by_size = {each.shape[2:]: each for each in maps}
    if len(by_size) == 1:
        wanted = [maps[len(maps) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]
    else:
        wanted = list(by_size.values())
    assert_maps(outputs.stages, wanted)


@pytest.mark.parametrize(("name", "size"), [*map(fast_or_slow, TORCHVISION)])
def test_maps_of_torchvision(name, size):
    classifier, stock, images = staged(f"torchvision:{name}", size, preactivations=True)
    with torch.no_grad():
        outputs = classifier(images)
        torch.testing.assert_close(outputs.logits, stock(images))
        after, before = (nodes.split() for nodes in TORCHVISION[name, size])
        assert_maps(outputs.stages, [map_at(stock, node, images) for node in after])
        for node, given, activated in zip(before, outputs.preactivations, outputs.stages, strict=True):
            if node.startswith("="):
                activation = stock.get_submodule(node[1:]) if node[1:] else nn.Identity()
                torch.testing.assert_close(activation(given.clone()), activated)
            else:
                torch.testing.assert_close(given, map_at(stock, node, images))


def map_at(network, node, images):
    """One at a time: the graph's own steps in place would overwrite what it has handed out."""
    return create_feature_extractor(network, {node: "map"})(images)["map"]


@pytest.mark.parametrize("name", ["resnet8", "resnet32x4", "vgg8", "shufflenetv1"])
def test_maps_before_the_last_activation_of_the_small_networks(name):
    classifier, _, images = staged(f"cifar:{name}", 32, preactivations=True)
    with torch.no_grad():
        outputs = classifier(images)
    assert len(outputs.preactivations) == len(outputs.stages)
    for before, after in zip(outputs.preactivations, outputs.stages, strict=True):
        assert not torch.equal(before, after)
        assert torch.equal(before.relu(), after)


@pytest.mark.parametrize("name", ["wrn_16_2", "mobilenetv2"])
def test_maps_that_end_in_no_activation_are_their_own(name):
    outputs = (taken := staged(f"cifar:{name}", 32, preactivations=True))[0](taken[2])
    assert all(
        torch.equal(one, other) for one, other in zip(outputs.preactivations, outputs.stages, strict=True)
    )


def test_a_network_that_keeps_its_head():
    classifier, stock, images = staged("torchvision:squeezenet1_1", 64)
    extraction = classifier.extract(images)
    torch.testing.assert_close(extraction.scores, stock(images))
    torch.testing.assert_close(extraction.features, extraction.stages[-1].mean((2, 3)))


@pytest.mark.parametrize("name", ["hiera_tiny_224", "hrnet_w18_small"])
@pytest.mark.slow
def test_maps_that_the_library_would_not_give_are_refused(name):
    """Hiera's tokens lie in another order than its pixels; HRNet's resolutions run side by side."""
    with pytest.raises(InputError, match="has no feature maps"):
        staged(f"timm:{name}", 64)
