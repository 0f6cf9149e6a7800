"""Hinton's distillation against its formula and, with standardised logits, against the authors' code."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.distillers.golden import Golden, golden_cases

WEIGHTS = {"weight_label": "ce_weight", "weight_kl": "kd_weight", "temperature": "temperature"}


def test_it_is_hinton_s_formula(batch, build, losses):
    student, teacher, images = batch
    temperature = 3.0
    found = losses(build("kd", weight_label=0.3, weight_kl=0.7, temperature=temperature), batch)
    f, g = student.logits[:6].double(), teacher.logits[:6].double()
    kl = 0.0
    for i in range(6):
        p, q = torch.softmax(f[i] / temperature, 0), torch.softmax(g[i] / temperature, 0)
        kl += sum(float(b) * math.log(float(b) / float(a)) for a, b in zip(p, q, strict=True)) / 6
    ce = F.cross_entropy(f, images.labels[:6])
    expected = 0.3 * ce + 0.7 * temperature**2 * kl
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-6)
    assert set(found.parts) == {"cross_entropy", "soft_target_kl"}


def compare(golden, distiller, agrees):
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(distiller, [student], [golden["teacher_logits"]])
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["soft_target_kl"], golden["kd"])
    agrees(losses.total.detach(), golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])


@pytest.mark.parametrize("setting", ["", "imagenet_"])
@pytest.mark.parametrize("case", golden_cases("KD"))
def test_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    compare(golden, build("kd", golden.facts, **golden.numbers(**WEIGHTS)), agrees)


@pytest.mark.parametrize("setting", ["", "imagenet_", "paper_"])
@pytest.mark.parametrize("case", golden_cases("LSKD"))
def test_standardised_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    keys = {"standardize_logits": True, "sample_deviation": setting != "paper_", **golden.numbers(**WEIGHTS)}
    compare(golden, build("kd", golden.facts, **keys), agrees)
