"""What methods on features do not go with, said at the start in one line."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kdav_fast.config.loading import load_config
from kdav_fast.config.method import method_section
from kdav_fast.data.batch import Batch
from kdav_fast.distillers import cocord
from kdav_fast.distillers.base import Progress, Shapes
from kdav_fast.distillers.memories import checks, sample
from kdav_fast.errors import InputError
from kdav_fast.models import build_classifier
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import ManyToOneHead
from kdav_fast.student.student import Student
from kdav_fast.train.setup import naming_sizes
from kdav_fast.train.trial import check_learned

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
        ("uskd", ["alpha", "beta", "mu"]),
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


@pytest.mark.parametrize(
    ("method", "keys", "remedy"),
    [
        ("crd", {}, r"lower distiller.width \(128\), or take fewer images \(data.train_subset\)"),
        ("wcord", {}, r"lower distiller.width \(128\)"),
        ("pskd", {}, r"take fewer images \(data.train_subset\), or another distiller.name"),
        (
            "cocord",
            {"queue": 2**24, "width": 99},
            "lower one of them",
        ),
        ("kdav", {"memory_length": 10**9}, "lower distiller.memory_length, or use distiller.posterior=ids"),
    ],
)
def test_memories_that_do_not_fit(build, monkeypatch, method, keys, remedy):
    monkeypatch.setattr(checks, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(sample, "free_memory", lambda device: 2**20)
    with pytest.raises(
        InputError, match=rf"need .* GiB, but 0.0 GiB of memory a process are free; .*{remedy}"
    ):
        build(method, {"labels": np.arange(100_000) % 5}, **keys)


def test_modules_that_do_not_fit(build, monkeypatch):
    def too_large(*sizes):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] err == 0. can't allocate memory")

    monkeypatch.setattr(cocord, "head", too_large)
    with pytest.raises(
        InputError, match=r"'cocord' does not fit .*; lower distiller.hidden \(7\) or"
    ) as error:
        build("cocord", hidden=7)
    assert "train.batch_size" not in str(error.value)


def test_what_is_too_large_in_the_middle_of_a_run_is_named_too():
    section = method_section({"name": "norm", "copies": 99})
    said = r"train.batch_size.* data.image_size or distiller.copies \(99\)"
    with pytest.raises(InputError, match=said), naming_sizes(section):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes differ"), naming_sizes(section):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(("method", "least"), [("rkd", 3), ("sp", 2), ("pkt", 2), ("sskd", 2)])
def test_too_few_images_for_a_term_in_which_they_meet(method, least):
    def load(images):
        method_keys = [f"distiller.name={method}", "teacher.name=cifar:resnet8", "data.crop=none"]
        return load_config(None, [*method_keys, f"train.batch_size={2 * images}", "train.accumulate=2"])

    load(least)
    with pytest.raises(
        InputError, match=f"is {least - 1} with distiller.name '{method}', .*; make it {least} or more"
    ):
        load(least - 1)


@pytest.mark.parametrize("weights", [{"weight_angle": 0.0}, {"weight_distance": 0.0}])
def test_two_images_teach_rkd_nothing_and_three_do(weights, build):
    """Why they are refused."""
    distiller = build("rkd", weight_label=0.0, **weights)
    for images, teaches in ((2, False), (3, True)):
        features = torch.randn(images, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        answers = (
            Outputs(features, torch.zeros(images, 5)),
            Outputs(features.detach().square(), torch.zeros(images, 5)),
        )
        index, valid = torch.arange(images), torch.ones(images, dtype=torch.bool)
        losses = distiller(*answers, Batch(index, index, valid, index), {}, Progress(0, 1, 0.0, 1.0))
        losses.total.backward()
        assert bool(features.grad.abs().max() > 1e-6) == teaches


@pytest.mark.parametrize("method", ["kd", "simkd", "sskd", "at"])
def test_standardised_logits_of_two_classes(build, method):
    keys = {"weight_kl": 1.0, "standardize_logits": True}
    with pytest.raises(InputError, match="standardize_logits does not go with 2 classes"):
        build(method, {"classes": 2}, **keys)


def test_normalised_logits_of_two_classes(build):
    with pytest.raises(
        InputError, match="'norm' normalises each image's logits, of which 2 classes leave 1 and -1"
    ):
        build("norm", {"classes": 2})


@pytest.mark.parametrize(
    ("method", "term"), [("dkd", "beta"), ("nkd", "gamma"), ("uskd", "beta"), ("dist", "weight_inter")]
)
def test_terms_that_are_constant_with_two_classes_are_told(build, method, term):
    (remark,) = build(method, {"classes": 2}).remarks()
    assert f"(distiller.{term}) of distiller.name '{method}' is constant" in remark
    assert not build(method).remarks()


def test_more_negatives_than_images_are_told(build):
    (remark,) = build("crd", negatives=33).remarks()
    assert "as few as 32 of 40 training images are of other classes" in remark
    assert not build("crd", negatives=32).remarks()


def test_a_projector_narrower_than_one_channel(build):
    with pytest.raises(InputError, match="distiller.factor is 10, but the teacher's map has 9 channels"):
        build("simkd", weight_map=1.0, factor=10)


@pytest.mark.parametrize("rows", [1, 2])
def test_modules_that_normalise_one_image(build, rows):
    learned = {name: one.module for name, one in build("reviewkd").learned().items()}
    refused = pytest.raises(InputError, match="'reviewkd' cannot train on one image .* module 'review'")
    with refused if rows == 1 else nullcontext():
        check_learned("reviewkd", learned, rows)


def test_a_student_whose_features_are_no_mean_of_its_last_map():
    network = build_classifier("cifar:wrn_16_2", 10, image_size=32)
    network.take_stages()
    with pytest.raises(
        InputError, match="wrn_16_2 are not the mean of its last feature map, on which this method"
    ):
        Student(network, ManyToOneHead(128, 64, 10, copies=2))
