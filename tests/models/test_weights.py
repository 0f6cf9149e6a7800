"""Weights from files: the usual wrappings, and files that are broken or hostile."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdav_fast.errors import InputError
from kdav_fast.models import load_weights


@pytest.fixture
def tensors():
    return {"conv.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2, dtype=torch.bfloat16)}


class TouchesAFile:
    """A pickle that does something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def assert_same(loaded, expected):
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        load_weights(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_safetensors_with_metadata(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"architecture": "cifar:resnet8"})
    loaded, metadata = load_weights(path)
    assert_same(loaded, tensors)
    assert metadata == {"architecture": "cifar:resnet8"}


def test_the_content_decides_not_the_name(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.pth")
    assert_same(load_weights(tmp_path / "model.pth")[0], tensors)
    torch.save(tensors, tmp_path / "model.safetensors")
    assert_same(load_weights(str(tmp_path / "model.safetensors"))[0], tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_new_and_old(tmp_path, tensors, zipped):
    torch.save(tensors, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    loaded, metadata = load_weights(tmp_path / "model.pt")
    assert_same(loaded, tensors)
    assert metadata == {}


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model", "model_state", "model_state_dict", "net", "state_dict_ema"]
)
def test_wrappers(tmp_path, tensors, wrapper):
    content = {"epoch": 3, "optimizer": {"state": {}}, wrapper: tensors, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "model.pt")
    assert_same(load_weights(tmp_path / "model.pt")[0], tensors)


def test_plain_weights_go_before_averaged_ones(tmp_path, tensors):
    averaged = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"state_dict_ema": averaged, "state_dict": tensors}, tmp_path / "model.pt")
    assert_same(load_weights(tmp_path / "model.pt")[0], tensors)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes(tmp_path, tensors, prefix):
    torch.save({"model": {prefix + name: tensor for name, tensor in tensors.items()}}, tmp_path / "model.pt")
    assert_same(load_weights(tmp_path / "model.pt")[0], tensors)


def test_a_prefix_of_some_names_is_part_of_them(tmp_path, tensors):
    mixed = {**tensors, "module.weight": torch.zeros(1)}
    torch.save(mixed, tmp_path / "model.pt")
    assert_same(load_weights(tmp_path / "model.pt")[0], mixed)


@pytest.mark.parametrize("how", ["torch", "torch, old", "pickle 2", "pickle 5"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_does_not_run(tmp_path, tensors, how):
    path, touched = tmp_path / "model.pt", tmp_path / "touched"
    content = {"state_dict": tensors, "extra": TouchesAFile(touched)}
    if how.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    else:
        path.write_bytes(pickle.dumps(TouchesAFile(touched), protocol=int(how[-1])))
    message = refusal(path)
    assert "refused" in message
    assert "code" in message
    assert not touched.exists()
    pickle.loads(pickle.dumps(TouchesAFile(touched)))  # it would have
    assert touched.exists()


@pytest.mark.parametrize(
    "content", [b"", b"hello, these are not weights", b"PK\x03\x04 truncated", b"12345678{bad"]
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert "not a" in refusal(path)


def test_a_safetensors_file_cut_short(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-5])
    assert "not a whole safetensors file" in refusal(path)


def test_a_torch_file_cut_short(tmp_path, tensors):
    path = tmp_path / "model.pt"
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a checkpoint" in refusal(path)


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in refusal(tmp_path / "nowhere.pt")
    assert "directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        (
            {"epoch": 3, "optimizer": {}, "loss": 0.5, "lr": 0.1},
            "'epoch', 'optimizer', 'loss' and 1 more",
        ),
        ({}, "no keys"),
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
        ({"state_dict": {"model": {"weight": torch.zeros(1)}}}, "'state_dict'"),
    ],
)
def test_torch_files_without_a_state_dict(tmp_path, content, held):
    torch.save(content, tmp_path / "model.pt")
    assert held in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("fc.weight", [1.0, float("nan"), float("inf")], "fc.weight holds 2 of 3 values that are not finite"),
        ("fc.weight", [1e300], "fc.weight holds 1 of 1 values that are not finite in float32"),
        ("bn.running_var", [1.0, -1e-3], "bn.running_var holds a negative variance"),
    ],
)
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_values_that_no_network_can_compute_with(tmp_path, tensors, name, values, said, save):
    path = tmp_path / "model.bin"
    save(tensors | {name: torch.tensor(values, dtype=torch.float64)}, path)
    assert said in refusal(path)


def test_values_that_look_odd_but_are_not(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    sound = {
        "bn.running_var": torch.zeros(2),
        "bn.running_mean": -torch.ones(2),
        "bn.num_batches_tracked": torch.tensor(-1),
        "empty": torch.zeros(0),
        "empty.running_var": torch.zeros(0),
        "half": torch.tensor([65504.0], dtype=torch.float16),
    }
    save_file(tensors | sound, path)
    assert_same(load_weights(path)[0], tensors | sound)


def test_a_flipped_bit_in_a_torch_file(tmp_path, tensors):
    """torch reads such a file without a word."""
    path = tmp_path / "model.pt"
    torch.save(tensors | {"wide": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(500.0, 504.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["wide"], torch.arange(1000.0))
    assert "is damaged: model/data/2 in it has not its check sum; copy it again" in refusal(path)


def test_a_torch_file_without_check_sums(tmp_path, tensors):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert archive.testzip()  # it has none
    assert_same(load_weights(tmp_path / "model.pt")[0], tensors)


def test_a_pipe_and_a_device_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "is a pipe or a device; give a" in refusal(path)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "fc.weight is sparse or quantized"),
        (torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "fc.weight is sparse or quantized"),
        (torch.empty(3, device="meta"), "fc.weight has no values"),
    ],
)
def test_tensors_without_plain_values(tmp_path, tensors, tensor, said):
    torch.save(tensors | {"fc.weight": tensor}, tmp_path / "model.pt")
    assert said in refusal(tmp_path / "model.pt")
