"""ONNX files as sources: fixed and dynamic sizes, weights beside them, and what they must say of themselves."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdav_fast.errors import InputError
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.inference.trained import inference_config, open_trained, start_inference
from kdav_fast.student.onnx_file import is_onnx, onnx_metadata, read_onnx

pytest.importorskip("onnxruntime")
from tests.student.small_onnx import card, truth, write_onnx


@pytest.mark.parametrize("batch", [1, 4, "n"])
@pytest.mark.parametrize("external", [False, True])
def test_any_number_of_images_goes_through_any_batch_dimension(tmp_path, batch, external):
    network, found = read_onnx(
        write_onnx(tmp_path / "a.onnx", onnx_metadata(card()), batch, external=external)
    )
    assert found == card()
    images = torch.randn(7, 3, 8, 8).to(memory_format=torch.channels_last)
    np.testing.assert_allclose(network(images).logits.numpy(), truth(images.numpy()), rtol=1e-5, atol=1e-6)


def test_the_metadata_tell_a_stranger_all_that_the_input_needs():
    told = onnx_metadata(
        card(classes=("Hähnchen", 'a "b"'), data=card().data.model_copy(update={"eval_resize": 11}))
    )
    assert json.loads(told["classes"]) == ["Hähnchen", 'a "b"']
    assert json.loads(told["mean"]) == [0.5, 0.5, 0.5]
    assert json.loads(told["std"]) == [0.25, 0.25, 0.25]
    assert (told["image_size"], told["resize"], told["crop"]) == ("8", "11", "center")
    assert (told["architecture"], told["step"]) == ("cifar:resnet8", "4")


def test_an_onnx_file_is_evaluated_like_the_network_in_it(tmp_path):
    """Against NumPy on the digits' own pixels."""
    from PIL import Image

    from kdav_fast.data import open_evaluation_images
    from kdav_fast.data.preprocessing import evaluation_preprocessing
    from kdav_fast.data.torchvision_loader import transform

    accuracy = evaluate_file(write_onnx(tmp_path / "a.onnx", onnx_metadata(card()), 4), ["device=cpu"])
    images = open_evaluation_images(card().data, card().classes)
    view = transform(evaluation_preprocessing(card().data, card().normalization))
    pixels = np.stack([view(Image.open(images.open(n)).convert("RGB")).numpy() for n in range(len(images))])
    right = truth(pixels).argmax(1) == images.labels
    assert accuracy.images == len(images) == 900
    assert accuracy.top1 == pytest.approx(100 * right.mean(), abs=0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: write_onnx(path, {}), "carries no 'kdav_fast' metadata"),
        (lambda path: write_onnx(path, {"kdav_fast": "{}"}), "metadata is damaged or of another version"),
        (lambda path: path.write_bytes(b"\x08\x0a\x12"), "is no ONNX file that onnxruntime can read"),
        (lambda path: path.write_bytes(b""), "is no ONNX file that onnxruntime can read"),
        (lambda path: None, "No such file"),
    ],
    ids=["no card", "damaged card", "damaged", "empty", "missing"],
)
def test_files_that_cannot_be_used_are_told_in_one_line(tmp_path, make, message):
    path = tmp_path / "a.onnx"
    make(path)
    with pytest.raises(InputError, match=message) as error:
        open_trained(path)
    assert "\n" not in str(error.value)


def test_missing_weights_beside_the_file_are_told(tmp_path):
    path = write_onnx(tmp_path / "a.onnx", onnx_metadata(card()), external=True)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match="with the file of its weights if it has one"):
        open_trained(path)


def test_without_onnxruntime_the_package_is_named(tmp_path, monkeypatch):
    path = write_onnx(tmp_path / "a.onnx", onnx_metadata(card()))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        InputError, match=r"needs the package onnxruntime; install it with: .*kdav_fast\[onnx\]"
    ):
        open_trained(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=16"], "takes images of 8 pixels but data.image_size is 16; use data.image_size=8"),
        (["train.precision=bf16"], "train.precision has no effect on an evaluation of an ONNX file"),
        (["data.layout=contiguous"], "data.layout has no effect"),
    ],
)
def test_what_the_file_has_decided_cannot_be_overridden(tmp_path, overrides, message):
    trained = open_trained(write_onnx(tmp_path / "a.onnx", onnx_metadata(card())))
    with pytest.raises(InputError, match=message):
        start_inference(trained, inference_config(trained, overrides))


def test_other_classes_than_the_metadata_names_are_refused(tmp_path):
    trained = open_trained(write_onnx(tmp_path / "a.onnx", onnx_metadata(card(classes=("a", "b")))))
    with pytest.raises(InputError, match="scores 10 classes but its metadata names 2"):
        start_inference(trained, inference_config(trained, ["device=cpu"]))


def test_an_onnx_file_is_known_by_content_where_the_name_says_nothing(tmp_path):
    assert is_onnx(write_onnx(tmp_path / "model.bin", onnx_metadata(card())))
    assert is_onnx(write_onnx(tmp_path / "model.ONNX", onnx_metadata(card())))
    for name in ("weights.onnx", "weights.bin"):  # what earlier versions wrote
        save_file({"a": torch.zeros(3)}, tmp_path / name)
        assert not is_onnx(tmp_path / name)
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    assert not is_onnx(tmp_path / "weights.pt")
