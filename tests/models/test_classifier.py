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
    ("timm:vit_tiny_patch16_224", 224),
    ("timm:test_convnext", 64),
    ("torchvision:resnet18", 64),
    ("torchvision:mobilenet_v2", 64),
    ("torchvision:shufflenet_v2_x0_5", 64),
    ("torchvision:vit_b_32", 224),
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
        self.other = nn.Linear(4, 5) if end in ("averaged", "auxiliary", "tuple") else None

    def forward(self, images):
        features = self.conv(images).mean((2, 3))
        logits = self.fc(features)
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
    model = build_classifier(name, 11).eval()
    stock = build_stock(name, 11).eval()
    # Strict: the names and shapes are those of the untouched architecture.
    stock.load_state_dict(model.stock_state_dict(), strict=True)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, logits, embedding = model(images)
        assert torch.equal(logits, stock(images))
        assert torch.equal(logits, model.classifier(features))
    assert features.shape == (2, model.feature_width)
    assert logits.shape == (2, model.classes) == (2, 11)
    assert embedding is None
    assert (model.name, model.width, model.normalization) == (name, 1.0, None)
    assert isinstance(model.classifier, nn.Linear)


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


def test_weights_of_another_width():
    model = build_classifier("cifar:resnet8", 10)
    before = {name: tensor.clone() for name, tensor in model.stock_state_dict().items()}
    message = refusal(model.load_stock_state_dict, build_stock("cifar:resnet8", 10, width=2.0).state_dict())
    assert message.startswith("the weights do not fit cifar:resnet8 with 10 classes and width 1: ")
    assert "conv1.weight is 32 x 3 x 3 x 3, needed 16 x 3 x 3 x 3" in message
    assert message.count("needed") == 3
    assert "tensors differ)" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.stock_state_dict().items())


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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision:squeezenet1_0", "not the output of an nn.Linear"),
        ("timm:deit_tiny_distilled_patch16_224", "not the output of an nn.Linear"),
        ("torchvision:googlenet", "another head, aux1.fc2"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_stock_networks_without_a_single_head(name, reason):
    message = refusal(build_classifier, name, 10)
    assert message.startswith(f"{name} does not end in one nn.Linear")
    assert reason in message


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("softmax", "not the output of an nn.Linear"),
        ("averaged", "not the output of an nn.Linear"),
        ("tuple", "not the output of an nn.Linear"),
        ("auxiliary", "another head, other"),
        ("unpooled", "4 dimensions"),
        ("thrice", "called 3 times"),
        ("broken", "(no images here)"),
    ],
)
def test_networks_that_end_otherwise(end, reason):
    network = Net(end)
    assert reason in refusal(ImageClassifier, network, "mine", image_size=16)
    assert network.training
    assert not network.fc._forward_hooks


def test_a_network_of_ones_own():
    model = ImageClassifier(Net(), "mine", image_size=16)
    assert (model.feature_width, model.classes) == (4, 5)


def test_a_module_without_parameters():
    assert "not the output" in refusal(ImageClassifier, nn.Flatten(), "flat", image_size=8)
