"""What a logging interval tells of its batches."""

import pytest
import torch

from kdav_fast.data.batch import Batch
from kdav_fast.runtime.processes import Cluster
from kdav_fast.tracking.meter import TrainMeter

ALONE = Cluster(0, 1, 0, 1, torch.device("cpu"))
TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


def batch_of(labels, valid=None, mixed=None, views=1):
    labels = torch.tensor(labels)
    valid = torch.ones(len(labels), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Batch(
        torch.zeros(views * len(labels), 3, 1, 1), labels, valid, torch.arange(len(labels)), mixed, views
    )


def test_a_mixed_image_counts_for_the_class_of_the_largest_share():
    meter = TrainMeter(ALONE)
    shares = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    meter.update(shares, batch_of([0, 0], mixed=shares), torch.tensor(0.0), {}, TAKEN)
    assert meter.read()["train/top1"] == 100


def test_means_over_valid_images():
    meter = TrainMeter(ALONE)
    scores = torch.arange(7.0)
    logits = torch.stack([-scores, scores, scores])  # class 0 leads the first row, class 6 the others
    batch = batch_of([0, 1, 2], [True, True, False])
    meter.update(logits, batch, torch.tensor(2.0), {"part": torch.tensor(1.0)}, TAKEN)
    meter.update(-scores[None], batch_of([3]), torch.tensor(5.0), {"part": torch.tensor(4.0)}, TAKEN)
    values = meter.read()
    assert values["train/loss"] == pytest.approx((2 * 2 + 5) / 3)
    assert values["train/loss/part"] == pytest.approx((2 * 1 + 4) / 3)
    assert values["train/top1"] == pytest.approx(100 / 3)
    assert values["train/top5"] == pytest.approx(200 / 3)  # the second row puts its class 1 sixth
    assert values["images_per_second"] > 0
    assert 0 <= values["data_wait_share"] <= 1


def test_the_first_view_of_an_image_counts_and_padding_does_not():
    """Of other views, turned images say, the student need know nothing."""
    meter = TrainMeter(ALONE)
    right, wrong = torch.eye(7)[0], torch.eye(7)[3]
    logits = torch.stack([right, wrong, right, wrong, wrong, wrong])  # two views of three images
    meter.update(logits, batch_of([0, 0, 0], [True, True, False], views=2), torch.tensor(1.0), {}, TAKEN)
    assert meter.read()["train/top1"] == 50


def test_what_is_named_like_another_metric_is_a_part_of_the_loss():
    meter = TrainMeter(ALONE)
    meter.update(torch.eye(2), batch_of([0, 1]), torch.tensor(1.0), {"top1": torch.tensor(3.0)}, TAKEN)
    values = meter.read()
    assert (values["train/top1"], values["train/loss/top1"]) == (100, 3)


def test_a_step_that_was_not_taken_counts_for_nothing():
    meter = TrainMeter(ALONE)
    meter.update(torch.eye(2), batch_of([0, 1]), torch.tensor(1.0), {"part": torch.tensor(2.0)}, TAKEN)
    lost = torch.tensor(float("nan"))
    meter.update(lost * torch.eye(2), batch_of([0, 0]), lost, {"part": lost}, SKIPPED)
    values = meter.read()
    assert (values["train/loss"], values["train/loss/part"], values["train/top1"]) == (1, 2, 100)
    meter.update(lost * torch.eye(2), batch_of([0, 0]), lost, {}, SKIPPED)
    assert set(meter.read()) == {"images_per_second", "data_wait_share"}


def test_a_part_that_some_batches_lack_is_a_mean_over_all_images():
    meter = TrainMeter(ALONE)
    meter.update(torch.eye(2), batch_of([0, 1]), torch.tensor(1.0), {"part": torch.tensor(2.0)}, TAKEN)
    meter.update(torch.eye(2), batch_of([0, 1]), torch.tensor(3.0), {}, TAKEN)
    values = meter.read()
    assert (values["train/loss"], values["train/loss/part"]) == (2, 1)
