"""The accuracy benchmark: what a student is fed, what is made of the results, and a whole small run."""

import json
import statistics
from dataclasses import replace
from itertools import chain

import accuracy
import accuracy_data
import numpy as np
import pytest
import torch
from accuracy_data import StudyData
from accuracy_methods import MAIN, PRESETS, tasks
from accuracy_run import batches, top1
from PIL import Image
from safetensors.torch import save_file

from kdav_fast.data.order import EpochOrder
from kdav_fast.data.views import ClassPairs, Rotations, Shuffled, Views
from kdav_fast.models import build_classifier
from kdav_fast.models.outputs import Outputs
from tests.benchmarks.scripts import completed, refusal

CLASSES, COUNT = 3, 10
NETWORKS = ["teacher.name=cifar:resnet8", "teacher.width=0.25", "model.width=0.25", "data.image_size=16"]


@pytest.fixture
def study():
    """Ten images that show their position on the left; the teacher's answers are position and side."""
    pixels = torch.zeros(COUNT, 4, 4, 3, dtype=torch.uint8)
    pixels[:, :, 0] = torch.arange(COUNT, dtype=torch.uint8)[:, None, None]
    labels = torch.arange(COUNT) % CLASSES
    answers = torch.stack([torch.arange(COUNT).float(), torch.arange(COUNT) + 100.0])[..., None]
    splits = {f"{name}_pixels": pixels for name in ("train", "evaluation", "held_out")}
    splits |= {f"{name}_labels": labels for name in ("train", "evaluation", "held_out")}
    return StudyData(
        **splits,
        features=answers.expand(2, COUNT, 5),
        logits=answers.expand(2, COUNT, CLASSES),
        classifier_weight=torch.zeros(CLASSES, 5),
        classifier_bias=torch.zeros(CLASSES),
        mean=torch.zeros(3),
        std=torch.ones(3),
        teacher_correct=torch.tensor(9),
    )


def epochs(study, size, seed, order=Shuffled(), count=3):
    """The batches of so many epochs."""
    every = EpochOrder(study.train_labels.numpy(), size, shuffle=True, order=order, seed=seed)
    found = batches(study, every, seed)
    return [[next(found) for _ in range(every.batches)] for _ in range(count)]


@pytest.mark.parametrize("order", [Shuffled(), Views(3), ClassPairs()], ids=repr)
def test_a_student_and_its_teacher_see_the_same_side_of_the_same_image(study, order):
    sides = set()
    for batch, teacher in chain(*epochs(study, 3, seed=0, order=order)):
        left, right = (batch.images[:, 0, 0, side] * 255 for side in (0, -1))
        mirrored, position = teacher.features[:, 0] >= 100, teacher.features[:, 0] % 100
        torch.testing.assert_close(torch.where(mirrored, right, left), position)
        assert batch.views == order.count
        assert torch.equal(batch.index, position[:3].long())
        assert torch.equal(batch.labels.repeat(batch.views), position.long() % CLASSES)
        sides |= set(mirrored.tolist())
    assert sides == {True, False}


def test_a_turned_image_is_answered_as_turned(study):
    """Sides and turns are told apart by their answers: quarters in hundreds, twice as many as sides."""
    quarters = [study.features + 200 * number for number in range(4)]
    study = replace(study, features=torch.cat(quarters), logits=torch.cat([study.logits] * 4))
    [[(batch, teacher), *_]] = epochs(study, 3, seed=0, order=Rotations(4), count=1)
    for quarter, (images, answers) in enumerate(
        zip(batch.images.chunk(4), teacher.features[:, 0].chunk(4), strict=True)
    ):
        assert torch.equal(answers // 200, torch.full((3,), float(quarter)))
        torch.testing.assert_close(images, batch.images[:3].rot90(quarter, (2, 3)))
        assert torch.equal(answers % 100, batch.index.float())


def test_maps_are_of_the_side_that_is_seen(study):
    before = study.features.numpy()[:, :, :2, None, None].astype(np.float16) - 50
    study = replace(study, maps=(before,))
    for _, teacher in chain(*epochs(study, 3, seed=0)):
        shown = teacher.features[:, :2, None, None] - 50
        assert torch.equal(teacher.preactivations[0], shown)
        assert torch.equal(teacher.stages[0], shown.clamp(min=0))


def test_an_epoch_has_every_image_once_and_the_next_one_another_order(study):
    seen, again, other = (
        [list(chain(*(batch.index[batch.valid].tolist() for batch, _ in epoch))) for epoch in found]
        for found in (epochs(study, 3, seed=seed, count=2) for seed in (0, 0, 1))
    )
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in seen)
    assert seen[0] != seen[1]
    assert again == seen != other


def results_of(**top1):
    """What training would give: these accuracies of each method's seeds."""
    return [
        {
            "task": {"method": method, "seed": seed, "distiller": {}, "init": "torch", "lr": 0.1},
            "top1": value,
            "held_out_top1": None if method == "KD" else value - 1,
            "minutes": 1.0 + seed,
            "curve": [(1, 1.0, value / 2), (2, 2.0, value)],
        }
        for method, values in top1.items()
        for seed, value in enumerate(values)
    ]


def test_a_row_has_mean_and_deviation_over_seeds():
    kd, kdav = accuracy.summarize(results_of(KDAV=[70.0, 72.0, 74.0], KD=[69.0]))
    assert (kd["method"], kd["mean_top1"], kd["std_top1"], kd["held_out_top1"]) == ("KD", 69.0, None, None)
    assert (kdav["mean_top1"], kdav["std_top1"]) == (72.0, statistics.stdev([70, 72, 74]))
    assert (kdav["held_out_top1"], kdav["minutes"], kdav["seeds"]) == (71.0, 2.0, [0, 1, 2])


@pytest.mark.parametrize(
    ("kd", "met", "near"), [(69.9, True, False), (70.1, False, True), (71.5, False, False)]
)
def test_targets_are_judged_by_the_means(kd, met, near):
    rows = accuracy.summarize(results_of(KDAV=[71.0, 73.0], KD=[kd]))
    judged = {target["name"]: target for target in accuracy.targets(rows)}
    over_kd = judged["accuracy: KDAV over KD (points of top-1)"]
    assert over_kd["met"] is met
    assert ("reason" in over_kd) is near  # nearer than the seeds are to each other
    assert over_kd["measured"] == pytest.approx(72 - kd)
    untrained = judged["accuracy: KDAV over SimKD (points of top-1)"]
    assert untrained["met"] is untrained["measured"] is None


@pytest.fixture
def folder(tmp_path):
    """140 training images of noise, 8 others, and a teacher that nobody has trained."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 70), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    weights = build_classifier("cifar:resnet8", 2, width=0.25).stock_state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "teacher.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("subset", "held_out", "limit"), [("130", 10, 100), ("110", 12, 12), ("null", 0, 12)]
)
def test_held_out_images_are_trained_on_by_nobody(folder, monkeypatch, subset, held_out, limit):
    monkeypatch.setattr(accuracy_data, "HELD_OUT", limit)
    options = accuracy.make_parser().parse_args([f"--root={folder}/images", "--override", *NETWORKS])
    options.override.append(f"data.train_subset={subset}")
    config = accuracy.student_config(options, accuracy.chosen_preset(options), folder / "teacher.safetensors")
    device = torch.device("cpu")
    data = accuracy_data.load(accuracy_data.prepare(config, device, folder), device)
    every = {
        np.asarray(Image.open(path)).tobytes(): label
        for label, name in enumerate(("cat", "dog"))
        for path in (folder / "images" / "train" / name).iterdir()
    }
    found = [image.numpy().tobytes() for image in torch.cat([data.train_pixels, data.held_out_pixels])]
    assert len(data.train_pixels) == (140 if subset == "null" else int(subset))
    assert len(data.held_out_pixels) == held_out
    assert len(set(found)) == len(found)
    labels = torch.cat([data.train_labels, data.held_out_labels]).tolist()
    assert [every[image] for image in found] == labels


def test_accuracy_is_the_percentage_of_images_classified_right(study):
    def guess(images):
        shown = (images[:, 0, 0, 0] * 255).round().long()  # the position, which is the class modulo 3
        return Outputs(None, torch.eye(CLASSES)[(shown + (shown >= 4)) % CLASSES])

    student = torch.nn.Module()
    student.forward = guess
    assert top1(student, study, study.evaluation_pixels, study.evaluation_labels, size=3) == 40.0
    assert top1(student, study, study.evaluation_pixels[:0], study.evaluation_labels[:0]) is None


def test_what_an_earlier_attempt_trained_is_found_and_nothing_else(tmp_path):
    first, *others = tasks(PRESETS["cpu"], "torch")
    file, circumstances = tmp_path / "students.jsonl", ["teacher", {"width": 0.5}]
    accuracy.Log(file, circumstances).add(first, {"top1": 50.0})
    again = accuracy.Log(file, circumstances)
    assert again.find(first)["top1"] == 50.0
    assert not any(again.find(task) for task in others)
    assert accuracy.Log(file, ["teacher", {"width": 1.0}]).find(first) is None


def test_a_line_that_a_kill_cut_in_half_costs_only_itself(tmp_path):
    one, two, three, *_ = tasks(PRESETS["cpu"], "torch")
    file = tmp_path / "students.jsonl"
    for task in (one, two):
        accuracy.Log(file, []).add(task, {"top1": 50.0})
    file.write_bytes(file.read_bytes()[:-20])
    accuracy.Log(file, []).add(three, {"top1": 60.0})
    again = accuracy.Log(file, [])
    assert [again.find(task) is not None for task in (one, two, three)] == [True, False, True]


@pytest.mark.slow
def test_a_small_run_is_finished_by_the_same_command(folder):
    arguments = ["--device=cpu", f"--root={folder}/images", f"--teacher={folder}/teacher.safetensors"]
    arguments += ["--workers=1", f"--work={folder}/work", "--eager", "--epochs=4", "--train-subset=130"]
    arguments += ["--variant-seeds=1", f"--json={folder}/result.json", "--override", *NETWORKS]
    methods = ["--methods", *MAIN, "KDAV, with labels (weight 0.1)"]
    log = folder / "work" / "students.jsonl"
    completed("accuracy.py", [*arguments, "--seeds=1", *methods])
    lines = log.read_text().splitlines()
    assert len(lines) == len(MAIN) + 1
    completed("accuracy.py", [*arguments, "--seeds=2", *methods])
    assert log.read_text().splitlines()[: len(lines)] == lines
    record = json.loads((folder / "result.json").read_text())
    seeds = {row["method"]: row["seeds"] for row in record["rows"]}
    assert seeds == {**{method: [0, 1] for method in MAIN}, methods[-1]: [0]}
    assert all([len(curve) for curve in row["curves"]] == [4] * len(row["seeds"]) for row in record["rows"])
    assert record["teacher_top1"] in [100 * n / 8 for n in range(9)]
    assert str(folder) not in json.dumps(record)
    completed("accuracy.py", [*arguments[:-1], "model.width=0.5", "--seeds=1", "--methods", "KD"])
    assert len(log.read_text().splitlines()) == 2 * len(MAIN) + 2  # another student is not the one of the log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root=/nowhere", "--teacher=/nowhere"], "data.root /nowhere is not a folder"),
        (["--root=/nowhere", "--epochs=0"], "--epochs: invalid int above 0 value: '0'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    given = ["--device=cpu", f"--work={tmp_path}", *arguments]
    assert message in refusal("accuracy.py", given, monkeypatch, capsys)
