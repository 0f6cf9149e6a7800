"""Arguments for a library's constructor, and the image size that a network must be told."""

import pytest
import timm
import torch
import torchvision

from kdav_fast.errors import InputError
from kdav_fast.models import build_classifier, build_stock
from kdav_fast.models.stock import find_stock, head_tensors

VIT = "timm:vit_tiny_patch16_224"


def refusal(*args, build=find_stock, **options) -> str:
    with pytest.raises(InputError) as error:
        build(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def sketched_facts(name, size):
    """Without memory for the weights, where that goes."""
    if "regnet" in name:
        return find_stock(name, 3, image_size=size).facts
    with torch.device("meta"):
        return find_stock(name, 3, image_size=size).facts


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        (VIT, 96, {"img_size": 96}),
        (VIT, 224, {}),  # its own
        ("timm:test_vit", 96, {}),  # which interpolates by itself
        ("timm:resnet18", 96, {}),
        ("timm:resnet18", 32, {}),
        ("timm:swin_tiny_patch4_window7_224", 64, {"img_size": 64}),
        ("timm:efficientformer_l1", 64, {}),  # takes the argument, yet works with no other size
        ("torchvision:vit_b_32", 96, {"image_size": 96}),
        ("torchvision:swin_t", 64, {}),
        ("torchvision:regnet_x_400mf", 64, {}),  # which reckons its sizes with tensors
        ("torchvision:maxvit_t", 448, {"input_size": [448, 448]}),
        ("torchvision:maxvit_t", 100, {}),
    ],
)
def test_a_network_of_one_size_is_built_for_the_data_s(name, size, arguments):
    facts = sketched_facts(name, size)
    assert facts.arguments == arguments
    assert facts.image_size == (size if arguments else 160 if "test_vit" in name else 224)


def test_the_size_asked_for_counts():
    facts = find_stock(VIT, 3, image_size=96, arguments={"img_size": 64}).facts
    assert (facts.arguments, facts.image_size) == ({"img_size": 64}, 64)
    message = refusal(VIT, 3, image_size=96, arguments={"img_size": 64}, build=build_classifier)
    assert message.startswith(f"{VIT} cannot classify an RGB image of 96 x 96 pixels (Input height (96)")
    assert "its own is 64" in message


def test_arguments_reach_the_constructor():
    network = build_stock("timm:test_vit", 3, arguments={"img_size": 32, "depth": 2, "patch_size": 8})
    wanted = timm.create_model("test_vit", num_classes=3, img_size=32, depth=2, patch_size=8)
    network.load_state_dict(wanted.state_dict(), strict=True)
    vision = build_stock("torchvision:mobilenet_v3_small", 3, arguments={"width_mult": 0.5})
    wanted = torchvision.models.mobilenet_v3_small(num_classes=3, width_mult=0.5)
    vision.load_state_dict(wanted.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("name", "key", "near"),
    [
        ("timm:test_vit", "drop_path", "drop_path_rate"),
        ("timm:hrnet_w18_small", "drop_rat", "drop_rate"),  # timm words it in its own way
        ("timm:convformer_s18", "dorp_rate", "drop_rate"),  # whose constructor takes any argument
        ("torchvision:mobilenet_v3_small", "drop", "dropout"),  # likewise
        ("torchvision:resnet18", "img_size", "groups"),
        ("torchvision:vit_b_32", "img_size", "image_size"),
    ],
)
def test_unknown_arguments(name, key, near):
    message = refusal(name, 3, arguments={key: 1})
    assert message.startswith(f"{name} takes no argument '{key}'; the nearest that it takes are ")
    assert near in message


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("timm:test_vit", {"num_classes": 5}, "'num_classes': the data's classes decide it"),
        ("timm:test_vit", {"in_chans": 1}, "images are RGB"),
        ("timm:test_vit", {"checkpoint_path": "x"}, "use the key checkpoint"),
        ("timm:test_vit", {"pretrained_cfg_overlay": 1}, "takes no argument 'pretrained_cfg_overlay' here"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "use the key pretrained"),
        (
            "timm:test_vit",
            {"drop_path_rate": "a"},
            "cannot be built with the arguments {'drop_path_rate': 'a'}",
        ),
        ("timm:test_vit", {"num_heads": 5}, "cannot be built with the arguments"),
        ("cifar:resnet8", {"depth": 3}, "takes no argument 'depth'; cifar: networks have a width only"),
    ],
)
def test_arguments_that_cannot_be(name, arguments, reason):
    message = refusal(name, 3, arguments=arguments)
    assert reason in message
    assert len(message) < 400


def test_random_numbers_stay_where_they_are():
    torch.manual_seed(0)
    plain = torchvision.models.vit_b_32(num_classes=3, image_size=64).state_dict()
    after = torch.rand(1)
    torch.manual_seed(0)
    found = find_stock("torchvision:vit_b_32", 3, image_size=64).network.state_dict()
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cifar:resnet8", {"fc.weight", "fc.bias"}),
        ("timm:test_vit", {"head.weight", "head.bias"}),
        (
            "timm:levit_128s",
            {f"{head}.linear.{it}" for head in ("head", "head_dist") for it in ("weight", "bias")},
        ),
        ("torchvision:regnet_x_400mf", {"fc.weight", "fc.bias"}),
        ("torchvision:squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),
    ],
)
def test_tensors_of_the_head(name, wanted):
    assert head_tensors(name) == wanted


@pytest.mark.parametrize("name", [VIT, "timm:deit_tiny_distilled_patch16_224", "torchvision:vit_b_32"])
def test_weights_of_another_image_size_are_resampled(name):
    """Position embeddings that vary slowly are found again where the same places are, and nothing else changes."""
    family, _, _ = name.partition(":")
    patch = 32 if family == "torchvision" else 16
    key = "encoder.pos_embedding" if family == "torchvision" else "pos_embed"
    short = {} if family == "torchvision" else {"depth": 1}
    small, large = (build_classifier(name, 3, image_size=side * patch, arguments=short) for side in (4, 8))
    state = {it: tensor.clone() for it, tensor in small.stock_state_dict().items()}
    tokens = state[key].shape[1] - 16
    ramp = torch.linspace(-1, 1, 4)[:, None, None].expand(4, 4, state[key].shape[2])  # by rows
    state[key][:, tokens:] = ramp.reshape(1, 16, -1)
    large.load_stock_state_dict(state)
    loaded = large.stock_state_dict()
    grid = loaded[key][0, tokens:].reshape(8, 8, -1)
    assert torch.equal(loaded[key][:, :tokens], state[key][:, :tokens])
    assert (grid.diff(dim=0) > 0).all()
    torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))
    torch.testing.assert_close(grid.mean(0), torch.zeros_like(grid[0]), rtol=0, atol=1e-5)
    assert all(torch.equal(loaded[it], tensor) for it, tensor in state.items() if it != key)


def test_weights_of_another_image_size_that_nobody_resamples():
    small, large = (build_classifier("timm:levit_128s", 3, image_size=side) for side in (64, 96))
    message = refusal(small.stock_state_dict(), build=large.load_stock_state_dict)
    assert "attention_biases is 4 x 16, needed 4 x 36" in message


def test_weights_with_auxiliary_heads_load_without_them():
    theirs = torchvision.models.googlenet(num_classes=3, init_weights=True).state_dict()
    model = build_classifier("torchvision:googlenet", 3, image_size=32)
    model.load_stock_state_dict(theirs)
    ours = model.stock_state_dict()
    assert set(theirs) - set(ours) == {it for it in theirs if it.startswith(("aux1.", "aux2."))}
    assert all(torch.equal(tensor, theirs[it]) for it, tensor in ours.items())
