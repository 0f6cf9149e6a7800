"""Curriculum temperature against the authors' code, and its curriculum."""

import math

import pytest
import torch

from kdav_fast.distillers.base import Progress
from kdav_fast.distillers.ctkd import GlobalTemperature, curriculum
from tests.distillers.golden import Golden, golden_cases


@pytest.mark.parametrize("case", golden_cases("CTKD"))
def test_it_is_the_authors(case, build, agrees):
    golden = Golden(case)
    keys = golden.numbers(
        temperature_start="t_start",
        temperature_range="t_end",
        weight_label="ce_weight",
        weight_kl="kd_weight",
    )
    learned = GlobalTemperature().double()
    with torch.no_grad():
        learned.logit.fill_(golden["temperature_parameter"])
    # The epoch in which the cosine has come to the case's factor is the first one.
    epochs = math.pi / math.acos(1 + 2 * float(golden["lambda_value"]))
    distiller = build("ctkd", golden.facts, curriculum_epochs=epochs, **keys)
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(distiller, [student], [golden["teacher_logits"]], learned={"temperature": learned})
    agrees(losses.parts["temperature"], golden["temperature"])
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["soft_target_kl"], golden["kd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
    agrees(learned.logit.grad.squeeze(), golden["grad_temperature_parameter"])


def test_the_gradient_is_reversed_little_by_little(build, batch):
    factors = [curriculum(epoch, 10.0) for epoch in (0.0, 0.9, 4.5, 9.0, 200.0)]
    first = (math.cos(0.1 * math.pi) - 1) / 2
    assert factors == pytest.approx([first, first, -0.5, -1.0, -1.0])
    assert curriculum(0.0, 0.0) == -1
    distiller = build("ctkd")
    learned = {"temperature": distiller.learned()["temperature"].module}
    distiller(*batch, learned, Progress(0, 100, 0.0, 10.0)).total.backward()
    assert learned["temperature"].logit.item() == 1
