"""Networks by name: what is found, what is refused, and how pretrained weights arrive."""

import pytest
import timm
import torch
import torchvision

from kdav_fast.errors import InputError
from kdav_fast.models import IMAGENET, build_classifier, build_stock
from kdav_fast.models.cifar import CIFAR_NETWORKS


def refusal(*args, build=build_stock, **options) -> str:
    with pytest.raises(InputError) as error:
        build(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_stock_is_the_registered_network(name):
    with torch.device("meta"):
        wanted = CIFAR_NETWORKS[name](10, 0.5).state_dict()
        found = build_stock(f"cifar:{name}", 10, width=0.5).state_dict()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in wanted.items()
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cifar:resnet21", "cifar:resnet2"),
        ("timm:resnet_18", "timm:resnet18"),
        ("timm:resnet18.a1_in1", "timm:resnet18.a1_in1k"),
        ("torchvision:mobilenetv2", "torchvision:mobilenet_v2"),
        ("resnet18", "timm:resnet18, torchvision:resnet18, cifar:resnet8"),
        ("torch:resnet18", "torchvision:resnet18"),
        ("timm:", "timm:"),
        ("", "cifar:NAME"),
    ],
)
def test_unknown_names_come_with_near_ones(name, nearest):
    message = refusal(name, 10)
    assert message.startswith(f"unknown model '{name}'")
    assert nearest in message


def test_detectors_are_not_classifiers():
    assert "unknown model" in refusal("torchvision:fasterrcnn_resnet50_fpn", 10)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_width_belongs_to_the_small_networks(name):
    assert f"{name} was given width 0.5" in refusal(name, 10, width=0.5)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.1, 17.0, float("nan"), float("inf")])
def test_widths_out_of_range(width):
    assert "give 0.125 to 16" in refusal("cifar:resnet8", 10, width=width)


def test_classes_below_one():
    assert "0 classes" in refusal("timm:resnet18", 0)


def test_small_networks_have_no_pretrained_weights():
    assert "no pretrained weights" in refusal("cifar:resnet8", 10, build=build_classifier, pretrained=True)


@pytest.fixture
def no_download(monkeypatch):
    """The libraries' own download functions hand out a state dict with recognisable numbers, or nothing."""
    asked = []

    def serve(architecture_state):
        state = {key: torch.full_like(value, 0.25) for key, value in architecture_state.items()}

        def download(*args, **kwargs):
            asked.append(args or kwargs)
            return state

        for module in ("timm.models._builder", "torchvision.models._api"):
            monkeypatch.setattr(f"{module}.load_state_dict_from_url", download)
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
        return asked

    return serve


@pytest.mark.parametrize(("classes", "kept"), [(1000, True), (7, False)])
def test_timm_weights(no_download, classes, kept):
    asked = no_download(timm.create_model("test_resnet").state_dict())
    model = build_classifier("timm:test_resnet", classes, pretrained=True)
    assert asked
    assert model.classes == classes
    assert torch.all(model.backbone.conv1[0].weight == 0.25)
    assert bool(torch.all(model.classifier.weight == 0.25)) == kept
    config = timm.get_pretrained_cfg("test_resnet")
    assert (model.normalization.mean, model.normalization.std) == (config.mean, config.std)


@pytest.mark.parametrize(("classes", "kept"), [(1000, True), (7, False)])
def test_torchvision_weights(no_download, classes, kept):
    asked = no_download(torchvision.models.shufflenet_v2_x0_5().state_dict())
    model = build_classifier("torchvision:shufflenet_v2_x0_5", classes, pretrained=True)
    assert asked
    assert model.classes == classes
    assert torch.all(model.backbone.conv1[0].weight == 0.25)
    assert bool(torch.all(model.classifier.weight == 0.25)) == kept
    assert model.normalization == IMAGENET
    build_stock("torchvision:shufflenet_v2_x0_5", classes).load_state_dict(
        model.stock_state_dict(), strict=True
    )


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_no_network(monkeypatch, name):
    def fail(*args, **kwargs):
        raise OSError("Name or service\nnot known")

    for target in (
        "timm.models._builder.load_state_dict_from_hf",
        "timm.models._builder.load_state_dict_from_url",
        "torchvision.models._api.load_state_dict_from_url",
    ):
        monkeypatch.setattr(target, fail)
    message = refusal(name, 10, build=build_classifier, pretrained=True)
    assert message.startswith(f"{name}: its pretrained weights cannot be had (Name or service not known)")


def test_timm_networks_without_weights():
    message = refusal("timm:efficientnet_b8", 10, build=build_classifier, pretrained=True)
    assert "No pretrained weights exist" in message
