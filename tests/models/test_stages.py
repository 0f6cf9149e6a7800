"""How feature maps are taken: in the one pass, whole, and of the answers nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kdav_fast.errors import InputError
from kdav_fast.models import ImageClassifier, build_classifier
from tests.models.staged import assert_maps, small


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


def test_a_network_with_maps_may_be_compiled_after_one_without():
    """torch.compile reuses the code of the first for the second, unless it is told to look at hooks."""
    images = torch.randn(2, 3, 32, 32)
    for maps in (False, True):
        classifier = build_classifier("cifar:resnet8", 10, width=0.25)
        if maps:
            classifier.take_stages()
        wanted = [each.shape for each in classifier(images).stages]
        classifier.compile_backbone(backend="eager")
        assert [each.shape for each in classifier(images).stages] == wanted
    assert len(wanted) == 3


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
