"""The deployed student against the trained one, in the stock architectures, by torch and by onnxruntime."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdav_fast.config import DataConfig
from kdav_fast.errors import InputError
from kdav_fast.inference.trained import open_trained
from kdav_fast.models import build_classifier, build_stock
from kdav_fast.student.export import chosen_format, export, export_onnx, export_safetensors
from kdav_fast.student.file import StudentCard, read_student, write_student
from kdav_fast.student.heads import EmbeddingHead
from kdav_fast.student.student import Student

CLASSES = tuple("abcdefg")


def make_student(name, width=1.0):
    """A student in a trained state: moved statistics, observed prototypes."""
    torch.manual_seed(0)
    network = build_classifier(name, len(CLASSES), width=width)
    head = EmbeddingHead(network.feature_width, 11, len(CLASSES))
    student = Student(network, head)
    head.observe(torch.randn(50, 11) + 1, torch.arange(50) % len(CLASSES))
    head.set_center()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    return student.eval()


@pytest.fixture
def saved(tmp_path):
    """Writes a student as a run would; returns the file."""

    def write(name, width=1.0, image_size=32):
        card = StudentCard(
            name=name,
            width=width,
            classes=CLASSES,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            probabilistic=False,
            data=DataConfig(image_size=image_size),
            distiller="kdav",
            step=1,
            epoch=1.0,
        )
        path = tmp_path / "student.safetensors"
        write_student(path, make_student(name, width).weights(), card)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "width", "size"),
    [
        ("cifar:resnet8", 0.5, 32),
        ("cifar:vgg8", 0.25, 32),
        ("torchvision:mobilenet_v2", 1.0, 64),
        ("timm:resnet10t", 1.0, 64),
        ("timm:vit_tiny_patch16_224", 1.0, 224),
    ],
)
def test_the_stock_architecture_loads_it_strictly_and_answers_the_same(saved, tmp_path, name, width, size):
    source, output = saved(name, width, size), tmp_path / "out" / "student.safetensors"
    assert export_safetensors(source, output) < 1e-4
    stock = build_stock(name, len(CLASSES), width=width).eval()
    stock.load_state_dict(load_file(output), strict=True)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        trained = make_student(name, width)(images)
        deployed = stock(images)
    scale = trained.logits.abs().max()
    torch.testing.assert_close(deployed / scale, trained.logits / scale, rtol=0, atol=1e-4)
    cosine = (
        torch.nn.functional.normalize(trained.embedding, dim=1)
        @ make_student(name, width).head.prototypes().T.float()
    )
    assert torch.equal(deployed.argmax(1), cosine.argmax(1))


def test_an_exported_file_carries_its_card(saved, tmp_path):
    output = tmp_path / "out.safetensors"
    export_safetensors(saved("cifar:resnet8", 0.5), output)
    student, card = read_student(output)
    assert student.head is None
    assert (card.classes, card.mean, card.probabilistic) == (CLASSES, (0.5, 0.5, 0.5), False)


def test_onnx_answers_the_same_for_any_batch_size(saved, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    output = tmp_path / "student.onnx"
    export_onnx(saved("cifar:resnet8", 0.5), output)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    student = make_student("cifar:resnet8", 0.5)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, student(images).logits.numpy(), rtol=1e-3, atol=1e-4)


def test_onnx_tells_what_a_stranger_needs_and_nothing_warns(saved, tmp_path):
    onnx = pytest.importorskip("onnx")
    output = tmp_path / "missing" / "folders" / "student.onnx"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert export(saved("cifar:resnet8", 0.5), output).difference < 1e-4
    assert [str(one.message) for one in warned if one.category is FutureWarning] == []
    model = onnx.load(output)
    onnx.checker.check_model(model, full_check=True)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["classes"]) == list(CLASSES)
    assert (json.loads(told["mean"]), json.loads(told["std"])) == ([0.5] * 3, [0.25] * 3)
    assert (told["image_size"], told["resize"], told["architecture"]) == ("32", "37", "cifar:resnet8")
    assert json.loads(told["kdav_fast"])["classes"] == list(CLASSES)
    assert sorted(path.name for path in output.parent.iterdir()) == ["student.onnx"]


@pytest.mark.parametrize(
    ("output", "given", "expected"),
    [
        (None, None, "safetensors"),
        (None, "onnx", "onnx"),
        ("a.onnx", None, "onnx"),
        ("a.ONNX", None, "onnx"),
        ("a.safetensors", None, "safetensors"),
        ("a.onnx", "onnx", "onnx"),
        ("a.bin", "onnx", "onnx"),
        ("a", "safetensors", "safetensors"),
        ("a.onnx", "safetensors", r"--format is 'safetensors' but --output a.onnx ends in .onnx"),
        ("a.safetensors", "onnx", r"--format is 'onnx' but --output a.safetensors ends in .safetensors"),
        ("a.pt", None, r"--output a.pt ends in neither .safetensors nor .onnx"),
        ("a", None, r"--output a ends in neither .safetensors nor .onnx"),
    ],
)
def test_suffix_and_format_agree_or_are_refused(output, given, expected):
    output = output and Path(output)
    if expected in ("safetensors", "onnx"):
        assert chosen_format(output, given) == expected
        return
    with pytest.raises(InputError, match=expected):
        chosen_format(output, given)


def test_an_export_damages_nothing(saved, tmp_path, monkeypatch):
    source = saved("cifar:resnet8", 0.5)
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").touch()
    (tmp_path / "file").touch()
    outputs = {
        tmp_path: "is a folder; give a file",
        source: "is the file to be exported",
        run / "student.safetensors": "is a part of a run",
        checkpoint / "other.safetensors": "is a part of a run",
        tmp_path / "file" / "a.safetensors": "cannot be written: ",
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output, message in outputs.items():
        with pytest.raises(InputError, match=message):
            export(source, output, None if output.is_dir() else "safetensors")
    with pytest.raises(InputError, match="is no regular file"):
        export(source, Path("/dev/null"), "safetensors")
    assert not Path("/dev/null").is_file()
    output = tmp_path / "old.safetensors"
    output.write_bytes(b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="old.safetensors cannot be written: No space left on device"):
        export(source, output)
    assert before | {output: b"old"} == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_link_keeps_its_place(saved, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "target.safetensors")
    export(saved("cifar:resnet8", 0.5), link)
    assert link.is_symlink()
    assert read_student(tmp_path / "target.safetensors")[1].classes == CLASSES


def test_weights_of_a_run_that_was_not_at_its_end_say_so(saved, tmp_path):
    path = saved("cifar:resnet8", 0.5)
    student, card = read_student(path)
    assert export(path, tmp_path / "a.safetensors").note == ""
    write_student(path, student.weights(), card.model_copy(update={"steps": 4, "epoch": 0.25}))
    assert export(path, tmp_path / "a.safetensors").note == f"unfinished: step 1 of 4, epoch 0.25, {path}"
    exported = tmp_path / "a.safetensors"
    assert open_trained(exported).note == f"unfinished: step 1 of 4, epoch 0.25, {exported}"


def test_a_run_is_exported_to_its_own_folder_whatever_part_is_named(saved, tmp_path):
    path = saved("cifar:resnet8", 0.5)
    run = tmp_path / "run"
    run.mkdir()
    path.rename(run / "student.safetensors")
    assert export(run).output == run / "export" / "student.safetensors"
    assert export(run / "student.safetensors").output == run / "export" / "student.safetensors"
    with pytest.raises(InputError, match="is the file to be exported"):
        export(run / "export" / "student.safetensors")


def test_onnx_is_no_source_of_weights(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a\x12")
    with pytest.raises(InputError, match="is an ONNX file, from which no weights can be exported"):
        export(tmp_path / "a.onnx", tmp_path / "b.safetensors")


def test_what_onnx_cannot_express_is_one_line(saved, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Failed to export\n\x1b[31mwith colours\x1b[0m") from ValueError(
            "no such operator\nat all"
        )

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(
        InputError, match="cifar:resnet8 cannot be exported as ONNX .ValueError: no such operator"
    ) as e:
        export(saved("cifar:resnet8", 0.5), tmp_path / "a.onnx")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "a.onnx").exists()


def test_missing_export_libraries_are_named(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs the package onnxscript; .*kdav_fast\[onnx\]"):
        export_onnx(saved("cifar:resnet8", 0.5), tmp_path / "student.onnx")


def test_a_file_without_a_card_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="carries no 'kdav_fast' metadata"):
        read_student(path)


def test_a_classifier_without_bias_takes_no_head():
    network = build_classifier("cifar:resnet8", 3)
    network.classifier.bias = None
    with pytest.raises(InputError, match="without bias"):
        Student(network, EmbeddingHead(network.feature_width, 4, 3))
