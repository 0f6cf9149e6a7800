"""Decoupled KD against the authors' code, against KD, and where probabilities are below any float."""

import math

import pytest
import torch

from kdav_fast.config.loading import load_config
from kdav_fast.distillers.base import Progress
from kdav_fast.distillers.dkd import decoupled_kl
from kdav_fast.distillers.terms.softened import soft_target_kl
from kdav_fast.errors import InputError
from tests.distillers.golden import BEGINNING, Golden, golden_cases

WEIGHTS = {"temperature": "temperature", "weight_label": "ce_weight", "alpha": "alpha", "beta": "beta"}


def compare(golden, distiller, agrees, progress=BEGINNING):
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(distiller, [student], [golden["teacher_logits"]], progress)
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["target_class_kl"], golden["tckd"])
    agrees(losses.parts["non_target_class_kl"], golden["nckd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])


@pytest.mark.parametrize("setting", ["", "imagenet_"])
@pytest.mark.parametrize("case", golden_cases("DKD"))
def test_it_is_the_authors(case, setting, build, agrees):
    golden = Golden(case, setting)
    compare(golden, build("dkd", golden.facts, warmup_epochs=1.0, **golden.numbers(**WEIGHTS)), agrees)


@pytest.mark.parametrize("case", golden_cases("DKD"))
def test_while_it_warms_up_it_is_the_authors(case, build, agrees):
    golden = Golden(case, "warmup_")
    keys = golden.numbers(**WEIGHTS, warmup_epochs="epochs")
    # Epochs are counted from 1 there: in the middle of the fifth, four and a half are behind.
    progress = Progress(45, 2400, int(golden["epoch"]) - 0.5, 240.0)
    compare(golden, build("dkd", golden.facts, **keys), agrees, progress)


@pytest.mark.parametrize("case", golden_cases("LSDKD"))
def test_standardised_it_is_the_authors(case, build, agrees):
    golden = Golden(case)
    keys = {"standardize_logits": True, "sample_deviation": True, **golden.numbers(**WEIGHTS)}
    compare(golden, build("dkd", golden.facts, warmup_epochs=1.0, **keys), agrees)


def by_hand(student, teacher, label, temperature):
    """Both parts of one row, as the paper writes them: with the target removed."""

    def parts(logits):
        largest = max(logits)
        e = [math.exp((z - largest) / temperature) for z in logits]
        rest = [value for k, value in enumerate(e) if k != label]
        return e[label] / sum(e), [value / sum(rest) for value in rest]

    (p, p_others), (q, q_others) = parts(student), parts(teacher)
    first = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    second = sum(b * math.log(b / a) for a, b in zip(p_others, q_others, strict=True))
    return temperature**2 * first, temperature**2 * second


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_it_is_the_paper_s_formula(classes):
    generator = torch.Generator().manual_seed(classes)
    f, g = (3 * torch.randn(9, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(9) % classes
    found = torch.stack(decoupled_kl(f, g, labels, 2.5), dim=1)
    expected = [by_hand(*row, 2.5) for row in zip(f.tolist(), g.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_both_parts_together_are_hinton_s_where_the_second_has_its_factor():
    generator = torch.Generator().manual_seed(0)
    f, g = (3 * torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(9) % 6
    target, others = decoupled_kl(f, g, labels, 4.0)
    q = torch.softmax(g / 4, 1)[torch.arange(9), labels]
    torch.testing.assert_close(target + (1 - q) * others, soft_target_kl(f, g, 4.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gap", [20.0, 1000.0, 30000.0])
def test_it_is_exact_where_the_others_probabilities_are_below_any_float(dtype, gap):
    """exp(-1000) is 0 in every format; 1 - p_y would be, too."""
    f = torch.tensor([[gap, 0, 1], [0, gap, 1], [gap, 0, 1]], dtype=dtype, requires_grad=True)
    g = torch.tensor([[gap, 1, 0], [gap, 1, 0], [0, gap, 1]], dtype=dtype)
    labels = torch.tensor([0, 0, 0])
    target, others = decoupled_kl(f, g, labels, 1.0)
    (target + others).sum().backward()
    assert f.grad.isfinite().all()
    exact = f.detach().double(), g.double()
    expected = decoupled_kl(*exact, labels, 1.0)
    for found, truth in zip((target, others), expected, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
    # Row 1: the student puts gap on a class that is not the label, on which the teacher is sure.
    assert target[1].item() == pytest.approx(gap, rel=1e-2)


def test_warm_up_rises_in_each_epoch_from_the_first_on(batch, build, losses):
    without = losses(build("dkd", warmup_epochs=0.0), batch)
    hard = without.parts["cross_entropy"]
    distiller = build("dkd", warmup_epochs=4.0)
    shares = [
        ((losses(distiller, batch, epoch).total - hard) / (without.total - hard)).item()
        for epoch in (0.0, 0.9, 1.0, 2.5, 3.0, 4.0, 9.0)
    ]
    assert shares == pytest.approx([0.25, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rel=1e-5)


def test_label_smoothing_is_of_the_cross_entropy_alone(batch, build, losses):
    plain, smooth = (losses(build("dkd", {"label_smoothing": amount}), batch) for amount in (0.0, 0.2))
    log_p = batch[0].logits[:6].double().log_softmax(1)
    truth = 0.8 * plain.parts["cross_entropy"].double() - 0.2 * log_p.mean()
    torch.testing.assert_close(smooth.parts["cross_entropy"].double(), truth, rtol=1e-5, atol=1e-6)
    for part in ("target_class_kl", "non_target_class_kl"):
        assert torch.equal(smooth.parts[part], plain.parts[part])


def test_what_it_does_not_go_with(build):
    taught = ["distiller.name=dkd", "teacher.name=cifar:resnet8"]
    with pytest.raises(
        InputError, match="mixup and train.cutmix do not go with distiller.name 'dkd'; set them"
    ):
        load_config(None, [*taught, "train.mixup=0.2"])
    with pytest.raises(InputError, match="distiller.alpha and distiller.beta are both 0; raise one"):
        load_config(None, [*taught, "distiller.alpha=0", "distiller.beta=0"])
    with pytest.raises(InputError, match="the data have one class; use distiller.name=none"):
        build("dkd", {"classes": 1})
