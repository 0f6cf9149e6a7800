"""Labels only, against the formula in float64, padding left out."""

import torch
import torch.nn.functional as F

from tests.distillers.small_run import BATCH, CLASSES


def test_cross_entropy_with_the_labels(batch, build, losses):
    student, _, images = batch
    found = losses(build("none"), (student, None, images))
    log_p = student.logits[:6].double().log_softmax(1)
    expected = -log_p[torch.arange(6), images.labels[:6]].mean()
    torch.testing.assert_close(found.total.double(), expected)
    torch.testing.assert_close(found.parts["cross_entropy"].double(), expected)


def test_label_smoothing_and_mixed_images(batch, build, losses):
    student, _, images = batch
    shares = torch.full((BATCH, CLASSES), 0.0)
    shares[:, 1], shares[:, 3] = 0.25, 0.75
    log_p = student.logits[:6].double().log_softmax(1)
    mixed = losses(build("none"), (student, None, images._replace(mixed=shares)))
    torch.testing.assert_close(mixed.total.double(), -(log_p @ shares[0].double()).mean())
    smooth = losses(build("none", {"label_smoothing": 0.1}), (student, None, images))
    truth = 0.9 * F.one_hot(images.labels[:6], CLASSES) + 0.1 / CLASSES
    torch.testing.assert_close(smooth.total.double(), -(truth * log_p).sum(1).mean())
