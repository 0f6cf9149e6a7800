"""What methods on features do not go with, said at the start in one line."""

import numpy as np
import pytest

from kdav_fast.config.loading import load_config
from kdav_fast.distillers.base import Shapes
from kdav_fast.errors import InputError
from kdav_fast.models import build_classifier
from kdav_fast.student.heads import ManyToOneHead
from kdav_fast.student.student import Student

SQUARE, LARGE, FLAT = (4, 8, 8), (4, 12, 12), (4, 6, 8)


def networks(student, teacher, features=4):
    return {"student": Shapes("small", features, student), "teacher": Shapes("large", features, teacher)}


@pytest.mark.parametrize(
    ("method", "student", "teacher", "said"),
    [
        ("fitnets", SQUARE, LARGE, "4 x 8 x 8 .* teacher's 4 x 12 x 12, between which there is no regressor"),
        ("at", SQUARE, (4, 8, 6), "4 x 8 x 8 .* teacher's 4 x 8 x 6, which pooling to the smaller height"),
        ("vid", SQUARE, (4, 8, 6), "which pooling to the smaller height does not make alike"),
        ("norm", SQUARE, LARGE, "which pooling by a whole number does not make alike"),
        ("diffkd", SQUARE, LARGE, "but it compares maps of one height and width"),
        ("reviewkd", SQUARE, FLAT, "4 x 8 x 8 .* teacher's 4 x 6 x 8, but its fusion takes squares"),
    ],
)
def test_maps_that_it_cannot_compare(build, method, student, teacher, said):
    with pytest.raises(
        InputError,
        match=f"distiller.name '{method}': the student's feature map is {said if said[0] == '4' else '.*' + said}",
    ):
        build(method, networks((student,) * 2, (teacher,) * 2))


def test_a_stage_that_there_is_not(build):
    with pytest.raises(
        InputError, match="distiller.stage is 2 .* small has 2 feature maps; allowed: -2 to 1"
    ):
        build("fitnets", networks((SQUARE,) * 2, (SQUARE,) * 3), stage=2)


@pytest.mark.parametrize("method", ["pkt", "rkd", "crd", "wcord", "reviewkd", "sskd"])
def test_networks_without_pooled_features(build, method):
    with pytest.raises(InputError, match="small has no layer whose input could serve as features"):
        build(method, networks((SQUARE,), (SQUARE,), features=0))


def test_a_teacher_without_a_classifier(build):
    with pytest.raises(InputError, match="no linear classifier on pooled features, through which"):
        build("srrl", {"teacher_classifier": None})


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("crd", ["weight_feature"]),
        ("rkd", ["weight_distance", "weight_angle"]),
        ("wcord", ["weight_global", "weight_local"]),
        ("sskd", ["weight_transform", "weight_similarity"]),
        ("cocord", ["weight_contrast", "weight_predict"]),
    ],
)
def test_nothing_of_the_method_left(build, method, weights):
    said = " and ".join(f"distiller.{name}" for name in weights)
    with pytest.raises(ValueError, match=f"{said} being 0, nothing of distiller.name '{method}' is left"):
        build(method, **dict.fromkeys(weights, 0.0))


@pytest.mark.parametrize("method", ["crd", "wcord", "sskd"])
def test_mixed_images(method):
    with pytest.raises(InputError, match=f"do not go with distiller.name '{method}'; set them"):
        load_config(
            None,
            [f"distiller.name={method}", "teacher.name=cifar:resnet8", "train.mixup=0.2", "data.crop=none"],
        )


def test_turned_images_in_tiny_crops():
    taught = ["distiller.name=sskd", "teacher.name=cifar:resnet8"]
    with pytest.raises(InputError, match=r"data.crop_area begins at 0.08 .* use data.crop_area=\[0.2, 1.0\]"):
        load_config(None, taught)
    for fitting in ("data.crop_area=[0.2, 1.0]", "data.crop=padded"):
        load_config(None, [*taught, fitting])


def test_standardised_logits_where_none_are_softened():
    with pytest.raises(InputError, match="standardize_logits is of the KL term, which is off"):
        load_config(
            None, ["distiller.name=at", "teacher.name=cifar:resnet8", "distiller.standardize_logits=true"]
        )


def test_one_class(build):
    with pytest.raises(
        InputError, match="'crd' contrasts images of different classes, but the data have one class"
    ):
        build("crd", {"classes": 1})


def test_memories_that_do_not_fit(build):
    with pytest.raises(InputError, match=r"need .* GiB, but"):
        build("crd", {"labels": np.arange(10) % 5}, width=10**12)


def test_a_student_whose_features_are_no_mean_of_its_last_map():
    network = build_classifier("cifar:wrn_16_2", 10, image_size=32)
    network.take_stages()
    with pytest.raises(
        InputError, match="wrn_16_2 are not the mean of its last feature map, on which this method"
    ):
        Student(network, ManyToOneHead(128, 64, 10, copies=2))
