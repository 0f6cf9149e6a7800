"""Progressive self-distillation against the authors' code, and what it remembers."""

import psutil
import pytest
import torch

from kdav_fast.distillers.base import Progress
from kdav_fast.errors import InputError
from tests.distillers.golden import Golden, golden_cases


def progress_of(golden):
    """In the middle of the case's epoch."""
    epoch, epochs = int(golden["epoch"]), float(golden["epochs"])
    return Progress(int(epoch + 0.5), int(epochs), epoch + 0.5, epochs)


@pytest.mark.parametrize("case", golden_cases("PSKD"))
def test_it_is_the_authors(case, build, agrees, monkeypatch):
    golden = Golden(case)
    distiller = build("pskd", golden.facts, **golden.numbers(alpha="alpha_T"))
    # Given in float64, as the memory rounds to float16.
    monkeypatch.setattr(distiller.memory, "rows", lambda index: golden["previous_probabilities"][index])
    monkeypatch.setattr(distiller.memory, "seen", lambda index: torch.ones_like(index, dtype=torch.bool))
    remembered = []
    monkeypatch.setattr(distiller.memory, "update", lambda index, values, valid: remembered.append(values))
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(distiller, [student], progress=progress_of(golden))
    agrees(losses.parts["cross_entropy"], golden["ce"])
    agrees(losses.parts["self_cross_entropy"], golden["kd"])
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])
    agrees(remembered[0], golden["new_probabilities"])


@pytest.mark.parametrize("case", golden_cases("PSKD"))
def test_an_image_that_was_not_seen_has_its_label(case, build, agrees):
    golden = Golden(case, "first_epoch_")
    (student,) = golden.leaves("student_logits")
    losses = golden.losses(build("pskd", golden.facts), [student], progress=Progress(0, 300, 0.0, 300.0))
    agrees(losses.total, golden["loss"])
    agrees(student.grad, golden["grad_student_logits"])


def test_an_epoch_later_it_learns_from_what_it_said(batch, build, losses):
    student, teacher, images = batch
    distiller = build("pskd", alpha=0.5)
    losses(distiller, batch)
    said = student.logits[:6].double().softmax(1)
    found = losses(distiller, (student._replace(logits=student.logits.flip(1)), teacher, images), epoch=4.0)
    log_p = student.logits[:6].flip(1).double().log_softmax(1)
    hard = -log_p[torch.arange(6), images.labels[:6]].mean()
    expected = 0.75 * hard - 0.25 * (said * log_p).sum(1).mean()
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-3, atol=1e-4)


def test_answers_to_more_images_than_the_host_holds_are_refused(build, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 2**31}))
    labels = torch.zeros(1_281_167, dtype=torch.int64).numpy()
    with pytest.raises(
        InputError, match=r"1281167 x 1000 values of torch.float16 need 2\.4 GiB, but 2\.0 GiB"
    ):
        build("pskd", {"labels": labels, "classes": 1000})
