"""The split of a stock network: exact, complete, and refused where there is none."""

import copy

import pytest
import torch
from torch import nn

from kdav_fast.errors import InputError
from kdav_fast.models import ImageClassifier, build_classifier, build_stock

# Heads of every build: plain, behind dropout, behind pooling modules, a subclass of Linear, a transformer's.
SPLITTABLE = [
    ("timm:resnet18", 64),
    ("timm:mobilenetv3_small_050", 64),
    ("timm:vit_tiny_patch16_224", 32),
    ("timm:test_convnext", 64),
    ("torchvision:resnet18", 64),
    ("torchvision:mobilenet_v2", 64),
    ("torchvision:shufflenet_v2_x0_5", 64),
    # Averaged heads on two tokens, on one, and one a branch; 1x1 convolutions; attention's projection; auxiliary heads.
    ("timm:deit_tiny_distilled_patch16_224", 32),
    ("timm:levit_128s", 64),
    ("timm:crossvit_tiny_240", 48),
    ("timm:test_resnet", 32),
    ("timm:resnetv2_50", 32),
    ("timm:dla34", 64),
    ("timm:resnet50_clip", 64),
    ("timm:swin_tiny_patch4_window7_224", 64),
    ("torchvision:inception_v3", 80),
    ("torchvision:googlenet", 32),
    ("torchvision:vit_b_32", 64),
    ("cifar:resnet8", 32),
    ("cifar:wrn_16_2", 32),
    ("cifar:vgg8", 32),
    ("cifar:mobilenetv2", 32),
    ("cifar:shufflenetv1", 32),
    ("cifar:shufflenetv2", 32),
]


class Net(nn.Module):
    """Smallest image classifier whose end can be spoilt."""

    def __init__(self, end="plain"):
        super().__init__()
        self.end = end
        self.conv = nn.Conv2d(3, 4, 3, stride=8)
        self.fc = nn.Linear(4, 5)
        self.other = nn.Linear(4 if end != "apart" else 3, 5)
        self.conv_fc = nn.Conv2d(4, 5, 1)
        self.shares = nn.Parameter(torch.full((2,), 0.5 if end == "mixed" else 1.0))

    def forward(self, images):
        maps = self.conv(images)
        features = maps.mean((2, 3))
        if self.end == "convolution":
            return self.conv_fc(features[:, :, None, None]).flatten(1)
        if self.end == "unflattened":
            return self.conv_fc(maps).mean((2, 3))
        if self.end == "relu":  # as SqueezeNet ends
            return self.conv_fc(maps).relu().mean((2, 3))
        logits = self.fc(features)
        if self.end == "apart":
            return torch.stack([logits, self.other(maps[:, 1:].amax((2, 3)))]).mean(0)
        if self.end == "scaled":
            return self.shares[0] * logits
        if self.end == "mixed":
            return self.shares[0] * logits + self.shares[1] * self.other(features)
        if self.end == "summed":
            return logits + 0.5 * self.other(features)
        if self.end == "normalised":
            return nn.functional.normalize(logits)
        if self.end == "nothing":
            return None
        if self.end == "softmax":
            return logits.softmax(1)
        if self.end == "averaged":
            return (logits + self.other(features)) / 2
        if self.end == "tuple":
            return logits, self.other(features)
        if self.end == "unpooled":
            return self.fc(self.conv(images).permute(0, 2, 3, 1))
        if self.end == "thrice":
            return self.fc(self.fc(logits[:, :4])[:, :4])
        if self.end == "broken":
            raise RuntimeError("no\nimages here")
        return logits


def refusal(call, *args, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "size"), SPLITTABLE)
def test_split_network_is_the_stock_network(name, size):
    torch.manual_seed(0)
    model = build_classifier(name, 11, image_size=size).eval()
    stock = build_stock(name, 11, arguments=model.facts.arguments).eval()
    # Strict: the names and shapes are those of the untouched architecture.
    stock.load_state_dict(model.stock_state_dict(), strict=True)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, logits, embedding, *_ = model(images)
        assert torch.equal(logits, stock(images))
        assert torch.equal(logits, model.classifier(features))
    assert features.shape == (2, model.feature_width)
    assert logits.shape == (2, model.classes) == (2, 11)
    assert embedding is None
    linear = model.linear_classifier()
    with torch.no_grad():
        torch.testing.assert_close(linear(features), logits, rtol=1e-4, atol=1e-4)
        # Whatever a method folds into the head, the stock network does. Heads may start at zero: this one does not.
        linear.reset_parameters()
        stock.load_state_dict(model.stock_state_dict() | model.head_state_dict(linear), strict=True)
        torch.testing.assert_close(stock(images), linear(features), rtol=1e-4, atol=1e-4)
    assert (model.name, model.width, model.normalization) == (name, 1.0, None)
    model.train()(images)  # no method of training has other answers


def test_split_network_trains_as_the_stock_network():
    torch.manual_seed(0)
    model = build_classifier("cifar:resnet8", 10, width=0.5)
    stock = build_stock("cifar:resnet8", 10, width=0.5)
    assert model.training
    stock.load_state_dict(model.stock_state_dict())
    images = torch.randn(4, 3, 16, 16)
    model(images).logits.square().sum().backward()
    stock(images).square().sum().backward()
    split = {f"fc.{name}": parameter for name, parameter in model.classifier.named_parameters()}
    split.update(model.backbone.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter.grad, split[name].grad), name
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, model.stock_state_dict()[name]), name


@pytest.mark.parametrize("name", ["cifar:resnet8x4", "cifar:mobilenetv2", "torchvision:resnet18"])
def test_init_torch_starts_every_convolution_as_torch_does(name):
    torch.manual_seed(0)
    network = build_classifier(name, 10, init="torch")
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) > 8
    for module in convolutions:
        fan_in = module.weight[0].numel()  # of one output: inputs of its group times the kernel's area
        weight = module.weight.detach()
        assert weight.abs().max() <= fan_in**-0.5
        if weight.numel() >= 1000:
            assert weight.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_building_does_not_touch_running_statistics():
    model = build_classifier("timm:resnet18", 10)
    assert torch.all(model.backbone.bn1.running_mean == 0)
    assert model.backbone.bn1.num_batches_tracked == 0


def test_building_leaves_no_hooks():
    model = build_classifier("cifar:resnet8", 10)
    assert not any(module._forward_hooks for module in model.modules())


def test_load_stock_state_dict_round_trip():
    source, target = (build_classifier("cifar:wrn_16_2", 10, width=0.25) for _ in range(2))
    target.load_stock_state_dict(build_stock("cifar:wrn_16_2", 10, width=0.25).state_dict())
    target.load_stock_state_dict(source.stock_state_dict())
    source, target = source.eval(), target.eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(source(images).logits, target(images).logits)


def test_a_copy_is_whole():
    model = build_classifier("cifar:resnet8", 10, width=0.25).eval()
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(copy.deepcopy(model)(images).logits, model(images).logits)


def test_weights_of_another_architecture():
    model, other = build_classifier("cifar:resnet8", 10), build_stock("cifar:vgg8", 10).state_dict()
    own = model.stock_state_dict()
    fit = sum(name in own and own[name].shape == tensor.shape for name, tensor in other.items())
    tensors = len(own.keys() | other.keys())
    assert f"({tensors - fit} of {tensors} tensors differ)" in refusal(model.load_stock_state_dict, other)


def test_weights_of_another_width():
    model = build_classifier("cifar:resnet8", 10)
    before = {name: tensor.clone() for name, tensor in model.stock_state_dict().items()}
    message = refusal(model.load_stock_state_dict, build_stock("cifar:resnet8", 10, width=2.0).state_dict())
    assert message.startswith("the weights do not fit cifar:resnet8 with 10 classes and width 1: ")
    assert "conv1.weight is 32 x 3 x 3 x 3, needed 16 x 3 x 3 x 3" in message
    assert message.count("needed") == 3
    assert "tensors differ)" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.stock_state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number(dtype):
    """Loaded, they would be cast: quantized ones to nonsense, complex ones to their real parts."""
    model = build_classifier("cifar:resnet8", 10)
    state = model.stock_state_dict()
    before = state["conv1.weight"].clone()
    state["conv1.weight"] = state["conv1.weight"].to(dtype)
    message = refusal(model.load_stock_state_dict, state)
    assert f"conv1.weight is of {str(dtype)[6:]}, needed floating-point values" in message
    assert torch.equal(model.stock_state_dict()["conv1.weight"], before)


def test_missing_and_unexpected_weights():
    model = build_classifier("cifar:resnet8", 10)
    state = model.stock_state_dict()
    state["head.bias"] = state.pop("fc.bias")
    message = refusal(model.load_stock_state_dict, state)
    assert "fc.bias is missing, head.bias is unexpected (2 of" in message


def test_weights_of_other_classes():
    model = build_classifier("cifar:resnet8", 10)
    message = refusal(model.load_stock_state_dict, build_stock("cifar:resnet8", 7).state_dict())
    assert "fc.weight is 7 x 64, needed 10 x 64, fc.bias is 7, needed 10 (2 of" in message


HEADS = [
    ("averaged", ("fc", "other"), 4),  # the same features under both: they stand there once
    ("apart", ("fc", "other"), 7),
    ("tuple", ("fc",), 4),
    ("auxiliary", ("fc",), 4),
    ("convolution", ("conv_fc",), 4),
    ("unflattened", ("conv_fc",), 4),
    ("relu", (), 4),
    ("summed", (), 4),
    ("thrice", (), 4),
    ("normalised", (), 4),
    ("scaled", (), 4),  # by a parameter that starts at 1
    ("mixed", (), 4),  # by parameters that start as a plain mean
]


@pytest.mark.parametrize(("end", "heads", "width"), HEADS)
def test_ends_of_every_kind(end, heads, width):
    """Split or whole, features and scores are those of the network as it was; what is split is a linear map."""
    torch.manual_seed(0)
    network = Net(end)
    plain = copy.deepcopy(network)
    model = ImageClassifier(network, "mine", image_size=16)
    assert network.training
    assert (model.head_paths, model.feature_width, model.classes) == (heads, width, 5)
    assert (model.classifier is None) == (not heads)
    images = torch.randn(3, 3, 16, 16)
    wanted = plain(images)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    features, logits, *_ = model(images)
    torch.testing.assert_close(logits, wanted)
    assert features.shape == (3, width)
    if heads:
        torch.testing.assert_close(model.linear_classifier()(features), wanted)
    plain.load_state_dict(model.stock_state_dict(), strict=True)


@pytest.mark.parametrize("end", ["averaged", "apart", "convolution", "unflattened"])
def test_any_linear_map_fits_into_the_head(end):
    """What is folded into the head, the stock network computes from the same features."""
    torch.manual_seed(0)
    network = Net(end)
    plain = copy.deepcopy(network)
    model = ImageClassifier(network, "mine", image_size=16)
    linear = nn.Linear(model.feature_width, 5)
    with torch.no_grad():
        plain.load_state_dict(model.stock_state_dict() | model.head_state_dict(linear), strict=True)
        images = torch.randn(3, 3, 16, 16)
        torch.testing.assert_close(plain(images), linear(model(images).features))


def test_a_head_that_starts_at_zero_is_found():
    network = Net()
    nn.init.zeros_(network.fc.weight)
    nn.init.zeros_(network.fc.bias)
    model = ImageClassifier(network, "mine", image_size=16)
    assert model.head_paths == ("fc",)
    assert not model.classifier.weight.any()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("softmax", "it answers with probabilities"),
        ("unpooled", "it answers with 1 x 2 x 2 x 5 numbers"),
        ("nothing", "it answers with a NoneType"),
        ("broken", "(no images here)"),
    ],
)
def test_networks_that_classify_nothing(end, reason):
    network = Net(end)
    assert reason in refusal(ImageClassifier, network, "mine", image_size=16)
    assert network.training
    assert not network.fc._forward_hooks
    assert not network.fc._forward_pre_hooks


def test_features_of_a_network_without_layers_to_watch():
    model = ImageClassifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "pool", image_size=8)
    features, logits, *_ = model(torch.rand(2, 3, 8, 8))
    assert (features.shape, logits.shape) == ((2, 0), (2, 3))
    assert (model.feature_width, model.classifier) == (0, None)


def test_watched_features_are_the_last_layer_s_in_a_copy_too():
    model = ImageClassifier(Net("relu"), "mine", image_size=16)
    images = torch.randn(2, 3, 16, 16)
    model(images)  # what it saw must not stand in the way of a copy
    twin = copy.deepcopy(model)
    wanted = twin.backbone.conv(images).mean((2, 3))
    torch.testing.assert_close(twin(images).features, wanted)
    assert model._features.seen is None
