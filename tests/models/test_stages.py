"""Feature maps: those that the libraries and the papers' own code mean, from the one pass, exact before and after."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

from kdav_fast.errors import InputError
from kdav_fast.models import ImageClassifier, build_classifier, build_stock
from kdav_fast.models.cifar import CIFAR_NETWORKS

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


def randomised(network):
    """Blocks that start as the identity, as zero-initialised ones do, would look like any other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return network


def staged(name, size, preactivations=False, **arguments):
    """A classifier that answers with maps, and the stock network of the same weights."""
    torch.manual_seed(0)
    classifier = randomised(build_classifier(name, 10, image_size=size, **arguments)).eval()
    stock = build_stock(name, 10, arguments=classifier.facts.arguments).eval()
    stock.load_state_dict(classifier.stock_state_dict())
    classifier.take_stages(preactivations)
    return classifier, stock, torch.randn(2, 3, size, size)


def assert_maps(given, wanted):
    assert len(given) == len(wanted)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


def small(preactivations=True):
    torch.manual_seed(0)
    classifier = randomised(build_classifier("torchvision:resnet18", 5, image_size=32))
    classifier.take_stages(preactivations)
    return classifier


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


@pytest.mark.parametrize(("name", "size"), map(fast_or_slow, TORCHVISION))
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


@pytest.mark.parametrize("training", [False, True])
def test_a_block_by_hand(training):
    """torchvision's ReLU works in place and several times in a block; both maps are whole nevertheless."""
    classifier = small().train(training)
    stock = copy.deepcopy(classifier)
    images = torch.randn(2, 3, 32, 32)
    outputs = classifier(images)
    network = stock.backbone
    stem = network.bn1(network.conv1(images))
    block = network.layer1[1]
    shortcut = network.layer1[0](network.maxpool(stem.relu()))
    total = block.bn2(block.conv2(block.bn1(block.conv1(shortcut)).relu())) + shortcut
    for given, wanted in (
        (outputs.preactivations[0], stem),
        (outputs.stages[0], stem.relu()),
        (outputs.preactivations[1], total),
        (outputs.stages[1], total.relu()),
    ):
        torch.testing.assert_close(given, wanted)


def test_nothing_is_taken_unasked():
    classifier = build_classifier("torchvision:resnet18", 5, image_size=32)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())
    assert classifier.stage_shapes() == ()
    assert classifier(torch.randn(2, 3, 32, 32)).stages == ()


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:googlenet", "cifar:resnet8"])
def test_answers_stay_the_same_to_the_last_bit(name):
    torch.manual_seed(0)
    classifier = build_classifier(name, 5, image_size=32)
    plain = copy.deepcopy(classifier)
    classifier.take_stages(preactivations=True)
    images = torch.randn(2, 3, 32, 32)
    for training in (False, True):
        torch.manual_seed(1)
        wanted = plain.train(training)(images)
        torch.manual_seed(1)
        given = classifier.train(training)(images)
        assert torch.equal(given.logits, wanted.logits)
        assert torch.equal(given.features, wanted.features)


def test_shapes_are_known_before_training():
    classifier = small()
    assert classifier.stage_shapes() == ((64, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1))
    assert classifier.stage_shapes(64)[0] == (64, 32, 32)
    assert [tuple(each.shape[1:]) for each in classifier(torch.randn(2, 3, 64, 64)).stages] == list(
        classifier.stage_shapes(64)
    )


def test_trial_passes_leave_no_trace():
    """Neither statistics nor random state move, and modules stay in the mode that each of them had."""
    classifier = build_classifier("torchvision:resnet18", 5, image_size=32)
    classifier.backbone.layer1.eval()
    state, modes = copy.deepcopy(classifier.state_dict()), [each.training for each in classifier.modules()]
    random = torch.get_rng_state()
    classifier.take_stages()
    classifier.stage_shapes()
    assert torch.equal(torch.get_rng_state(), random)
    assert [each.training for each in classifier.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_gradients_flow_through_maps():
    """Through maps before and after: those of the same sum over the network's own graph, cut at no place."""
    classifier = small().eval()
    stock = copy.deepcopy(classifier.backbone)
    images = torch.randn(2, 3, 32, 32)
    outputs = classifier(images)
    (outputs.stages[1].square().sum() + outputs.preactivations[1].sum()).backward()
    stem = stock.layer1[0](stock.maxpool(stock.bn1(stock.conv1(images)).relu()))
    block = stock.layer1[1]
    before = block.bn2(block.conv2(block.bn1(block.conv1(stem)).relu())) + stem
    (before.relu().square().sum() + before.sum()).backward()
    torch.testing.assert_close(classifier.backbone.conv1.weight.grad, stock.conv1.weight.grad)
    assert classifier.backbone.layer2[0].conv1.weight.grad is None


def test_maps_are_in_the_networks_type():
    classifier = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = classifier(torch.randn(2, 3, 32, 32))
    assert {each.dtype for each in outputs.stages + outputs.preactivations} == {torch.bfloat16}


def test_maps_of_channels_last_images():
    classifier = small().eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32)
    wanted = classifier(images).stages
    given = classifier(images.to(memory_format=torch.channels_last)).stages
    assert_maps(given, wanted)
    assert given[0].is_contiguous(memory_format=torch.channels_last)


def test_two_passes_in_a_step_and_none_remembered():
    classifier = small().eval()
    images = torch.randn(2, 2, 3, 32, 32)
    first, second = classifier(images[0]), classifier(images[1])
    assert not torch.equal(first.stages[0], second.stages[0])
    assert_maps(classifier(images[0]).stages, first.stages)
    (first.stages[-1].sum() + second.stages[-1].sum()).backward()
    copy.deepcopy(classifier)  # fails where a tensor of the graph is kept


def test_a_pass_that_failed_spoils_none_after_it():
    classifier = small().eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = classifier(images)
    hook = classifier.backbone.layer3.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        classifier(images)
    hook.remove()
    assert_maps(classifier(images).preactivations, wanted.preactivations)


def test_a_copy_takes_its_own():
    classifier = small().eval()
    averaged = AveragedModel(classifier)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(2)
    images = torch.randn(2, 3, 32, 32)
    wanted = classifier(images).stages
    given = averaged(images).stages
    assert len(given) == 5
    assert not torch.equal(given[0], wanted[0])
    assert_maps(classifier(images).stages, wanted)


def test_extracting_leaves_the_classifier_out():
    classifier = small().eval()
    images = torch.randn(2, 3, 32, 32)
    outputs, extraction = classifier(images), classifier.extract(images)
    assert extraction.scores is None
    assert torch.equal(extraction.features, outputs.features)
    assert_maps(extraction.stages + extraction.preactivations, outputs.stages + outputs.preactivations)
    torch.testing.assert_close(classifier.classifier(extraction.features), outputs.logits)


def test_a_network_that_keeps_its_head():
    classifier, stock, images = staged("torchvision:squeezenet1_1", 64)
    extraction = classifier.extract(images)
    torch.testing.assert_close(extraction.scores, stock(images))
    torch.testing.assert_close(extraction.features, extraction.stages[-1].mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_networks_give_the_same_maps(whole):
    classifier = small().eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = classifier(images)
    if whole:
        given = torch.compile(classifier, backend="aot_eager")
    else:
        classifier.backbone.compile(backend="aot_eager")
        given = classifier
    for _ in range(2):
        outputs = given(images)
        assert_maps(outputs.stages + outputs.preactivations, wanted.stages + wanted.preactivations)
        torch.testing.assert_close(outputs.logits, wanted.logits)
    sum(each.sum() for each in outputs.preactivations).backward()
    assert classifier.backbone.conv1.weight.grad is not None


class Flat(nn.Module):
    """No map is left after its first step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, images):
        return self.fc(self.layers(images))


class Functional(nn.Module):
    """Nothing shows what its activation is given."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 8, 3, 2)])
        self.fc = nn.Linear(8, 5)

    def forward(self, images):
        for convolution in self.convolutions:
            images = (convolution(images) + 1).relu()
        return self.fc(images.mean((2, 3)))


def test_networks_without_maps():
    classifier = ImageClassifier(Flat(), "mine", image_size=8)
    with pytest.raises(InputError, match="mine has no feature maps .* such as timm:resnet18"):
        classifier.take_stages()
    assert classifier(torch.randn(2, 3, 8, 8)).stages == ()


@pytest.mark.parametrize("name", ["hiera_tiny_224", "hrnet_w18_small"])
@pytest.mark.slow
def test_maps_that_the_library_would_not_give_are_refused(name):
    """Hiera's tokens lie in another order than its pixels; HRNet's resolutions run side by side."""
    with pytest.raises(InputError, match="has no feature maps"):
        staged(f"timm:{name}", 64)


def test_activations_that_nothing_shows():
    classifier = ImageClassifier(Functional(), "mine", image_size=32)
    with pytest.raises(InputError, match="mine calls an activation as a function"):
        classifier.take_stages(preactivations=True)
    classifier.take_stages()
    assert classifier.stage_shapes() == ((4, 15, 15), (8, 7, 7))


def test_maps_are_asked_for_once():
    classifier = small()
    with pytest.raises(RuntimeError, match="once"):
        classifier.take_stages()
