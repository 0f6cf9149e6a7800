"""Predictions are the evaluation's answers, from whatever file, and one bad image costs no other."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdav_fast.cli import main
from kdav_fast.data.checks.defects import Finding
from kdav_fast.data.sources.digits import prepare_digits
from kdav_fast.inference import predict as module
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.inference.predict import predict, split_arguments
from kdav_fast.inference.trained import open_trained
from kdav_fast.student.export import export_onnx
from kdav_fast.student.file import read_student, write_student


@pytest.fixture(scope="module")
def onnx_file(teacher_run, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    output = tmp_path_factory.mktemp("onnx") / "student.onnx"
    assert export_onnx(teacher_run, output) < 1e-4
    return output


@pytest.fixture(params=["run", "onnx"])
def source(request, teacher_run, onnx_file):
    return {"run": teacher_run, "onnx": onnx_file}[request.param]


def test_the_first_class_of_every_image_is_the_evaluations(source):
    """The labels are the names of the images' folders."""
    found = list(predict(open_trained(source), [prepare_digits(None) / "val"], ["device=cpu"], top=5))
    labels = [Path(one.image).parent.name for one in found]
    first = sum(one.guesses[0].name == label for one, label in zip(found, labels, strict=True))
    five = sum(label in [g.name for g in one.guesses] for one, label in zip(found, labels, strict=True))
    accuracy = evaluate_file(source, ["device=cpu"])
    assert (len(found), 100 * first / len(found)) == (accuracy.images, pytest.approx(accuracy.top1))
    assert 100 * five / len(found) == pytest.approx(accuracy.top5)


def run(capsys, *arguments):
    code = main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip().splitlines()


@pytest.fixture
def pictures(tmp_path):
    """Three sound images of odd sizes and names, and one of each kind of bad ones."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    Image.new("RGB", (30, 9)).save(folder / "wide.jpg")
    Image.new("L", (8, 8)).save(folder / "grey = odd.PNG")
    Image.new("RGBA", (9, 30)).save(folder / "deeper" / "tall.png")
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes((folder / "wide.jpg").read_bytes()[:-30])
    (folder / "notes.txt").write_text("passed over")
    (folder / ".hidden.png").write_text("passed over")
    return folder


def test_bad_images_are_named_and_the_others_predicted(teacher_run, pictures, capsys):
    code, output, errors = run(capsys, teacher_run, pictures, "nowhere.png", "device=cpu", "--top", "2")
    assert code == 2
    (line,) = errors
    assert line.startswith("kdav: error: 4 of 7 could not be classified: ")
    for name in ("text.jpg", "empty.png", "cut.jpg", "nowhere.png"):
        assert name in line
    answers = dict(line.rsplit(": ", 1) for line in output.splitlines())
    assert f"{pictures}/cut.jpg" in answers
    for name in ("wide.jpg", "grey = odd.PNG", "deeper/tall.png"):
        first, second = answers[f"{pictures}/{name}"].split(", ")
        assert first.endswith(" %")
        assert float(first.split()[1]) >= float(second.split()[1])


def test_json_is_one_object_with_probabilities_that_add_up(teacher_run, pictures, capsys):
    code, output, _ = run(capsys, teacher_run, pictures, "--json", "--top", "99", "device=cpu")
    assert code == 2
    found = json.loads(output)
    assert [len(one["classes"]) for one in found["images"]] == [10, 10, 10]
    for one in found["images"]:
        assert sum(guess["probability"] for guess in one["classes"]) == pytest.approx(1)
        scores = torch.tensor([guess["score"] for guess in one["classes"]], dtype=torch.float64)
        assert [guess["probability"] for guess in one["classes"]] == pytest.approx(scores.softmax(0).tolist())
    assert {Path(one["image"]).name for one in found["errors"]} == {"text.jpg", "empty.png", "cut.jpg"}


def test_an_image_that_only_the_decoder_refuses_costs_no_other(teacher_run, pictures, monkeypatch):
    """Nothing is found beforehand; decoding then fails for all that are decoded together."""
    for name in ("text.jpg", "empty.png"):
        (pictures / name).unlink()
    monkeypatch.setattr(module, "examine", lambda *_, **__: Finding(None))
    found = list(predict(open_trained(teacher_run), [pictures], ["device=cpu", "train.batch_size=2"]))
    refused = [Path(one.image).name for one in found if one.problem]
    assert refused == ["cut.jpg"]
    assert sum(bool(one.guesses) for one in found) == 3


def test_scores_that_are_not_finite_are_no_answer(teacher_run, pictures, tmp_path, capsys):
    student, card = read_student(teacher_run)
    weights = student.weights() | {"fc.weight": torch.full_like(student.weights()["fc.weight"], 3e38)}
    write_student(tmp_path / "wild.safetensors", weights, card)
    code, output, _ = run(capsys, tmp_path / "wild.safetensors", pictures / "wide.jpg", "device=cpu")
    assert (code, output.strip()) == (2, f"{pictures / 'wide.jpg'}: its class scores are not finite")
    accuracy = evaluate_file(tmp_path / "wild.safetensors", ["device=cpu"])
    assert accuracy.top1 == accuracy.top5 == 0
    assert "where scores are not finite, they count as wrong" in str(accuracy)


def test_kdavs_scores_are_not_sold_as_probabilities(teacher_run, pictures, tmp_path, capsys):
    student, card = read_student(teacher_run)
    path = tmp_path / "kdav.safetensors"
    write_student(path, student.weights(), card.model_copy(update={"probabilistic": False}))
    _, output, _ = run(capsys, path, pictures / "wide.jpg", "device=cpu")
    assert "(score " in output
    assert "%" not in output
    _, output, _ = run(capsys, path, pictures / "wide.jpg", "device=cpu", "--json")
    assert {guess["probability"] for guess in json.loads(output)["images"][0]["classes"]} == {None}


def test_words_with_a_key_are_overrides_unless_such_a_file_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("device=cpu").touch()
    words = ["a.png", "train.batch_size=3", "device=cpu", "mean=5.png", "data.workers=1"]
    paths, overrides = split_arguments(words)
    assert [str(path) for path in paths] == ["a.png", "device=cpu", "mean=5.png"]
    assert overrides == ["train.batch_size=3", "data.workers=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device=cpu"], "no image is given"),
        ([""], "the name of an image or folder is empty"),
        (["a.png", "optimizer.lr=1"], "optimizer.lr has no effect"),
        (["empty"], "holds no images"),
    ],
)
def test_what_cannot_be_predicted_is_told_in_one_line(teacher_run, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    code, _, errors = run(capsys, teacher_run, *(tmp_path / "empty" if w == "empty" else w for w in words))
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
