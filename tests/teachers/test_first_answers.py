"""What is said of a teacher when it first answers."""

import pytest
import torch
from torch import nn

from kdav_fast.data.batch import Batch
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.teachers.first_answers import FirstAnswers
from kdav_fast.teachers.frozen import FrozenTeacher

NAN = float("nan")


class Scaled(nn.Module):
    """Features are the pixels times a number; logits a product of them, which float16 may not hold."""

    def __init__(self, by):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.layer.weight, by)

    def forward(self, images):
        features = images.flatten(1)
        return Outputs(features, self.layer(features))


def batch_of(images, labels, valid=None, mixed=None):
    labels = torch.tensor(labels)
    valid = torch.ones(len(labels), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Batch(images, labels, valid, torch.arange(len(labels)), mixed)


@pytest.fixture
def look(capsys):
    """What is said of some batches of answers."""

    def see(*batches, valid=None):
        teacher = FrozenTeacher(Scaled(1.0), nn.Identity(), torch.device("cpu"), None)
        first = FirstAnswers(teacher, "weights.pt", start_cluster("cpu"))
        for features, logits, labels in batches:
            images = torch.zeros(len(labels), 1, 2, 2)
            first.see(batch_of(images, labels, valid), Outputs(features, logits))
        first.tell()
        first.tell()
        return capsys.readouterr().out

    return see


def answers(count, classes=10, right=True):
    labels = [i % classes for i in range(count)]
    given = torch.tensor(labels) if right else (torch.tensor(labels) + 1) % classes
    return torch.ones(count, 4), torch.nn.functional.one_hot(given, classes).float(), labels


@pytest.mark.parametrize(
    ("features", "logits", "said"),
    [
        ([1, 3], [], "features of 2 of the first 8"),
        ([], [5], "logits of 1 of the first 8"),
        ([0, 1], [1, 2, 3], "features and logits of 3 of the first 8"),
    ],
)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_is_named_and_counted(look, features, logits, said, value):
    batch = answers(8)
    batch[0][features, 2] = value
    batch[1][logits, 0] = value
    with pytest.raises(
        InputError, match=rf"the teacher's {said} images are not finite in fp32; .* weights\.pt"
    ):
        look(batch)


def test_padding_says_nothing(look):
    batch = answers(4)
    batch[0][3] = NAN
    assert look(batch, valid=[True, True, True, False]) == ""


def test_only_the_first_batch_is_judged(look):
    later = answers(20)
    later[0][0] = NAN
    assert look(answers(20), later) == ""


def test_an_overflow_of_float16_is_told_from_bad_weights():
    batch = batch_of(torch.ones(2, 1, 2, 2), [0, 1])
    for by, remedy in (
        (1e5, r"not finite in fp16, but they are in fp32; set teacher\.precision="),
        (NAN, "; mend"),
    ):
        teacher = FrozenTeacher(Scaled(by), nn.Identity(), torch.device("cpu"), torch.float16)
        with pytest.raises(InputError, match=f"logits of 2 of the first 2 images.*{remedy}"):
            FirstAnswers(teacher, "weights.pt", start_cluster("cpu")).see(batch, teacher(batch))


def test_a_teacher_that_guesses_is_told_once(look):
    assert look(answers(40)) == ""
    said = look(answers(40, right=False), answers(40, right=False))
    assert said.count("\n") == 1
    assert "the teacher answers 0 of 80 training images right" in said
    half = answers(20), answers(20, right=False)
    assert look(*half) == ""
    assert look(answers(8, right=False)) == ""  # too few to tell


def test_of_mixed_images_the_class_of_the_largest_share_counts(capsys):
    features, logits, labels = answers(40, right=False)  # what each image was mixed with, and is more of
    shares = 0.3 * torch.eye(10)[labels] + 0.7 * logits
    first = FirstAnswers(None, "weights.pt", start_cluster("cpu"))
    batch = batch_of(torch.zeros(40, 1, 2, 2), labels, mixed=shares)
    first.see(batch, Outputs(features, logits))
    first.tell()
    assert capsys.readouterr().out == ""


def test_a_teacher_that_always_answers_the_same(look):
    features, _, labels = answers(40)
    said = look((features, torch.zeros(40, 10), labels))
    assert "warning: the teacher answers the same to each of the first 40 images" in said
