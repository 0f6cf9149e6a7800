"""KDAV against the objective in float64, padding left out: what it measures, remembers and adds up."""

import pytest
import torch
import torch.nn.functional as F

from kdav_fast import kdav_loss
from tests.distillers.small_run import CLASSES


@pytest.fixture
def measured(batch, build):
    """Builds a distiller which has seen the batch before distillation."""

    def measured(label_smoothing=0.0, dtype=torch.float32, **keys):
        distiller = build("kdav", {"label_smoothing": label_smoothing, "dtype": dtype}, **keys)
        _, teacher, images = batch
        [phase] = distiller.phases()
        phase.see(images, teacher)
        phase.finish()
        return distiller

    return measured


def test_centre_and_prototypes_are_measured_without_padding(batch, measured):
    _, teacher, images = batch
    head = measured().head()
    seen = teacher.features[:6].double()
    torch.testing.assert_close(head.center.double(), seen.mean(0), rtol=1e-5, atol=1e-6)
    means = torch.stack([(seen - seen.mean(0))[images.labels[:6] == y].mean(0) for y in range(CLASSES)])
    torch.testing.assert_close(head.prototypes(), F.normalize(means, dim=1), rtol=1e-4, atol=1e-5)


def test_the_batch_is_remembered_first_then_the_loss_ranges_over_the_memory(batch, measured, losses):
    student, teacher, images = batch
    distiller = measured(memory_length=16, kappa_student=5.0, kappa_teacher=8.0, temperature=2.0)
    embedding = student.embedding.clone().requires_grad_()
    found = losses(distiller, (student._replace(embedding=embedding), teacher, images))
    centred = teacher.features[:6].double() - distiller.head().center.double()
    truth = kdav_loss(
        student.embedding[:6].double(),
        centred,
        teacher.logits[:6].double(),
        F.normalize(centred, dim=1),
        torch.softmax(teacher.logits[:6].double() / 2, 1),
        kappa_student=5,
        kappa_teacher=8,
        temperature=2,
    )
    assert distiller.memory.filled == 6
    torch.testing.assert_close(found.total.double(), truth.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.parts["membership_kl"].double(), truth.membership_kl.mean(), rtol=1e-4, atol=1e-5
    )
    found.total.backward()
    assert embedding.grad[:6].isfinite().all()
    assert (embedding.grad[:6] != 0).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_label_term_is_the_cross_entropy_of_the_prototypes_scores(batch, measured, losses, smoothing):
    student, teacher, images = batch
    keys = {"memory_length": 16, "kappa_student": 5.0}
    plain = losses(measured(**keys), batch)
    embedding = student.embedding.clone().requires_grad_()
    distiller = measured(smoothing, weight_label=0.3, **keys)
    found = losses(distiller, (student._replace(embedding=embedding), teacher, images))

    features = teacher.features[:6].double()
    means = [(features - features.mean(0))[images.labels[:6] == y].mean(0) for y in range(CLASSES)]
    z = student.embedding[:6].double()
    cosines = torch.stack([torch.stack([m @ row / m.norm() / row.norm() for m in means]) for row in z])
    log_p = (5 * cosines).log_softmax(1)
    truth = F.one_hot(images.labels[:6], CLASSES) * (1 - smoothing) + smoothing / CLASSES
    hard = -(truth * log_p).sum(1).mean()
    torch.testing.assert_close(found.parts["cross_entropy"].double(), hard, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((found.total - plain.total).double(), 0.3 * hard, rtol=1e-3, atol=1e-4)
    assert "cross_entropy" not in plain.parts
    found.total.backward()
    assert embedding.grad[:6].isfinite().all()


def test_running_prototypes_are_those_of_all_batches_seen(batch, measured, losses):
    student, teacher, images = batch
    distiller = measured(prototypes="running")
    assert distiller.head().class_mass.sum() == 0
    for shift in (0.0, 2.0):
        moved = teacher._replace(features=teacher.features + shift)
        losses(distiller, (student, moved, images))
    seen = teacher.features[:6].double() + 1.0  # the mean of both batches
    means = [(seen - distiller.head().center)[images.labels[:6] == y].mean(0) for y in range(CLASSES)]
    expected = F.normalize(torch.stack(means), dim=1)
    torch.testing.assert_close(distiller.head().prototypes(), expected, rtol=1e-4, atol=1e-5)


def test_uncentred_with_running_prototypes_nothing_is_measured(build):
    assert not build("kdav", prototypes="running", center=False).phases()


def test_ids_remember_the_teacher_s_class(batch, measured, losses):
    student, teacher, _ = batch
    distiller = measured(posterior="ids", memory_length=6)
    found = losses(distiller, batch)
    ids = teacher.logits[:6].argmax(1)
    assert torch.equal(distiller.memory.posterior, ids)
    centred = teacher.features[:6].double() - distiller.head().center.double()
    remembered = F.normalize(centred, dim=1), F.one_hot(ids, CLASSES).double()
    truth = kdav_loss(student.embedding[:6].double(), centred, teacher.logits[:6].double(), *remembered)
    torch.testing.assert_close(found.total.double(), truth.loss, rtol=1e-4, atol=1e-5)


def test_bf16_stays_near_float32(batch, measured, losses):
    totals = {}
    for dtype, unit_rows in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        distiller = measured(dtype=dtype, memory_length=8)
        totals[dtype] = losses(distiller, batch).total
        assert distiller.memory.embedding.dtype == unit_rows
        assert distiller.memory.posterior.dtype == dtype
        assert totals[dtype].dtype == torch.float32
    torch.testing.assert_close(totals[torch.bfloat16], totals[torch.float32], rtol=0.03, atol=0.03)


def test_state_holds_the_memory_but_not_the_student_s_head(batch, measured, losses):
    student, teacher, images = batch
    later = student, teacher._replace(features=teacher.features.flip(1)), images
    used, restored, fresh = (measured(memory_length=16) for _ in range(3))
    losses(used, batch)
    head = {name: tensor.clone() for name, tensor in restored.head().state_dict().items()}
    restored.load_state_dict({name: tensor.clone() for name, tensor in used.state_dict().items()})
    torch.testing.assert_close(dict(restored.head().state_dict()), head, rtol=0, atol=0)
    expected = losses(used, later).total
    assert torch.equal(losses(restored, later).total, expected)
    assert not torch.isclose(losses(fresh, later).total, expected, rtol=1e-3)
