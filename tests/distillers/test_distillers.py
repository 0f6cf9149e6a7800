"""Each method against its formula, in float64, with padding left out."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdav_fast import kdav_loss
from kdav_fast.config import KDAVConfig, KDConfig, NoDistiller, SimKDConfig
from kdav_fast.distillers import Target, build_distiller
from kdav_fast.models.outputs import Outputs

CLASSES, STUDENT_WIDTH, TEACHER_WIDTH, BATCH = 5, 6, 9, 8


@pytest.fixture
def batch():
    """Student and teacher outputs and a target whose last two rows are padding full of NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    student = Outputs(normal(BATCH, STUDENT_WIDTH), normal(BATCH, CLASSES), normal(BATCH, TEACHER_WIDTH))
    teacher = Outputs(normal(BATCH, TEACHER_WIDTH) + 1, normal(BATCH, CLASSES))
    valid = torch.arange(BATCH) < BATCH - 2
    for outputs in (student, teacher):
        for tensor in outputs:
            if tensor is not None:
                tensor[~valid] = torch.nan
    return student, teacher, Target(torch.arange(BATCH) % CLASSES, valid)


def build(config, label_smoothing=0.0, dtype=torch.float32, classifier=None):
    return build_distiller(
        config,
        student_width=STUDENT_WIDTH,
        teacher_classifier=classifier or torch.nn.Linear(TEACHER_WIDTH, CLASSES),
        classes=CLASSES,
        label_smoothing=label_smoothing,
        dtype=dtype,
    )


def test_labels_only(batch):
    student, _, target = batch
    losses = build(NoDistiller())(student, None, target)
    log_p = student.logits[:6].double().log_softmax(1)
    expected = -log_p[torch.arange(6), target.labels[:6]].mean()
    torch.testing.assert_close(losses.total.double(), expected)
    torch.testing.assert_close(losses.parts["cross_entropy"].double(), expected)


def test_label_smoothing_and_mixed_targets(batch):
    student, _, target = batch
    shares = torch.full((BATCH, CLASSES), 0.0)
    shares[:, 1], shares[:, 3] = 0.25, 0.75
    log_p = student.logits[:6].double().log_softmax(1)
    mixed = build(NoDistiller())(student, None, target._replace(mixed=shares))
    torch.testing.assert_close(mixed.total.double(), -(log_p @ shares[0].double()).mean())
    smooth = build(NoDistiller(), label_smoothing=0.1)(student, None, target)
    truth = 0.9 * F.one_hot(target.labels[:6], CLASSES) + 0.1 / CLASSES
    torch.testing.assert_close(smooth.total.double(), -(truth * log_p).sum(1).mean())


def test_kd_is_hinton_s_formula(batch):
    student, teacher, target = batch
    alpha, temperature = 0.7, 3.0
    losses = build(KDConfig(name="kd", alpha=alpha, temperature=temperature))(student, teacher, target)
    f, g = student.logits[:6].double(), teacher.logits[:6].double()
    kl = 0.0
    for i in range(6):
        p, q = torch.softmax(f[i] / temperature, 0), torch.softmax(g[i] / temperature, 0)
        kl += sum(float(b) * math.log(float(b) / float(a)) for a, b in zip(p, q, strict=True)) / 6
    ce = F.cross_entropy(f, target.labels[:6])
    expected = (1 - alpha) * ce + alpha * temperature**2 * kl
    torch.testing.assert_close(losses.total.double(), expected, rtol=1e-5, atol=1e-6)
    assert set(losses.parts) == {"cross_entropy", "soft_target_kl"}


def measured(config, teacher, target, label_smoothing=0.0):
    distiller = build(config, label_smoothing)
    assert distiller.needs_measuring
    distiller.measure(teacher, target)
    distiller.finish_measuring()
    return distiller


def test_kdav_measures_centre_and_prototypes_without_padding(batch):
    _, teacher, target = batch
    distiller = measured(KDAVConfig(name="kdav"), teacher, target)
    seen = teacher.features[:6].double()
    torch.testing.assert_close(distiller.head.center.double(), seen.mean(0), rtol=1e-5, atol=1e-6)
    means = torch.stack([(seen - seen.mean(0))[target.labels[:6] == y].mean(0) for y in range(CLASSES)])
    torch.testing.assert_close(distiller.head.prototypes(), F.normalize(means, dim=1), rtol=1e-4, atol=1e-5)


def test_kdav_remembers_the_batch_first_then_takes_the_loss_over_the_memory(batch):
    student, teacher, target = batch
    config = KDAVConfig(name="kdav", memory_length=16, kappa_student=5, kappa_teacher=8, temperature=2)
    distiller = measured(config, teacher, target)
    embedding = student.embedding.clone().requires_grad_()
    losses = distiller(student._replace(embedding=embedding), teacher, target)
    centred = teacher.features[:6].double() - distiller.head.center.double()
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
    torch.testing.assert_close(losses.total.double(), truth.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        losses.parts["membership_kl"].double(), truth.membership_kl.mean(), rtol=1e-4, atol=1e-5
    )
    losses.total.backward()
    assert embedding.grad[:6].isfinite().all()
    assert (embedding.grad[:6] != 0).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_kdav_label_term_is_the_cross_entropy_of_the_prototypes_scores(batch, smoothing):
    student, teacher, target = batch
    labelled = KDAVConfig(name="kdav", memory_length=16, kappa_student=5, weight_label=0.3)
    without = measured(labelled.model_copy(update={"weight_label": 0.0}), teacher, target)
    plain = without(student, teacher, target)
    distiller = measured(labelled, teacher, target, smoothing)
    embedding = student.embedding.clone().requires_grad_()
    losses = distiller(student._replace(embedding=embedding), teacher, target)

    features = teacher.features[:6].double()
    means = [(features - features.mean(0))[target.labels[:6] == y].mean(0) for y in range(CLASSES)]
    z = student.embedding[:6].double()
    cosines = torch.stack([torch.stack([m @ row / m.norm() / row.norm() for m in means]) for row in z])
    log_p = (5 * cosines).log_softmax(1)
    truth = F.one_hot(target.labels[:6], CLASSES) * (1 - smoothing) + smoothing / CLASSES
    hard = -(truth * log_p).sum(1).mean()
    torch.testing.assert_close(losses.parts["cross_entropy"].double(), hard, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((losses.total - plain.total).double(), 0.3 * hard, rtol=1e-3, atol=1e-4)
    assert "cross_entropy" not in plain.parts
    losses.total.backward()
    assert embedding.grad[:6].isfinite().all()


def test_kdav_running_prototypes_are_those_of_all_batches_seen(batch):
    student, teacher, target = batch
    distiller = measured(KDAVConfig(name="kdav", prototypes="running"), teacher, target)
    assert distiller.head.class_mass.sum() == 0
    for shift in (0.0, 2.0):
        moved = teacher._replace(features=teacher.features + shift)
        distiller(student, moved, target)
    seen = teacher.features[:6].double() + 1.0  # the mean of both batches
    means = [(seen - distiller.head.center)[target.labels[:6] == y].mean(0) for y in range(CLASSES)]
    expected = F.normalize(torch.stack(means), dim=1)
    torch.testing.assert_close(distiller.head.prototypes(), expected, rtol=1e-4, atol=1e-5)


def test_kdav_uncentred_with_running_prototypes_needs_no_pass():
    assert not build(KDAVConfig(name="kdav", prototypes="running", center=False)).needs_measuring


def test_kdav_ids_remember_the_teacher_s_class(batch):
    student, teacher, target = batch
    distiller = measured(KDAVConfig(name="kdav", posterior="ids", memory_length=6), teacher, target)
    losses = distiller(student, teacher, target)
    ids = teacher.logits[:6].argmax(1)
    assert torch.equal(distiller.memory.posterior, ids)
    centred = teacher.features[:6].double() - distiller.head.center.double()
    remembered = F.normalize(centred, dim=1), F.one_hot(ids, CLASSES).double()
    truth = kdav_loss(student.embedding[:6].double(), centred, teacher.logits[:6].double(), *remembered)
    torch.testing.assert_close(losses.total.double(), truth.loss, rtol=1e-4, atol=1e-5)


def test_kdav_in_bf16_stays_near_float32(batch):
    student, teacher, target = batch
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        distiller = build(KDAVConfig(name="kdav", memory_length=8), dtype=dtype)
        distiller.measure(teacher, target)
        distiller.finish_measuring()
        losses[dtype] = distiller(student, teacher, target).total
        assert distiller.memory.embedding.dtype == dtype
        assert losses[dtype].dtype == torch.float32
    torch.testing.assert_close(losses[torch.bfloat16], losses[torch.float32], rtol=0.03, atol=0.03)


def test_state_holds_the_memory_but_not_the_student_s_head(batch):
    student, teacher, target = batch
    later = student, teacher._replace(features=teacher.features.flip(1)), target
    config = KDAVConfig(name="kdav", memory_length=16)
    used, restored, fresh = (measured(config, teacher, target) for _ in range(3))
    used(*batch)
    head = {name: tensor.clone() for name, tensor in restored.head.state_dict().items()}
    restored.load_state_dict({name: tensor.clone() for name, tensor in used.state_dict().items()})
    torch.testing.assert_close(dict(restored.head.state_dict()), head, rtol=0, atol=0)
    expected = used(*later).total
    assert torch.equal(restored(*later).total, expected)
    assert not torch.isclose(fresh(*later).total, expected, rtol=1e-3)


@pytest.mark.parametrize(("weight_feature", "weight_kl"), [(1.0, 0.0), (0.5, 2.0), (0.0, 1.0)])
def test_simkd_is_the_papers_feature_term_and_hintons(batch, weight_feature, weight_kl):
    student, teacher, target = batch
    config = SimKDConfig(name="simkd", weight_feature=weight_feature, weight_kl=weight_kl, temperature=3.0)
    classifier = torch.nn.Linear(TEACHER_WIDTH, CLASSES)
    z = student.embedding.clone().requires_grad_()
    losses = build(config, classifier=classifier)(student._replace(embedding=z), teacher, target)
    losses.total.backward()

    # The gradient by hand: of the mean square 2 (z - t) / d, of the KL term T (p - q) through the classifier.
    weight, bias = classifier.weight.detach().double(), classifier.bias.detach().double()
    error = student.embedding[:6].double() - teacher.features[:6].double()
    p = torch.softmax((student.embedding[:6].double() @ weight.T + bias) / 3, 1)
    q = torch.softmax(teacher.logits[:6].double() / 3, 1)
    feature, kl = (error**2).sum() / (6 * TEACHER_WIDTH), 9 * (q * (q / p).log()).sum() / 6
    gradient = weight_feature * 2 * error / TEACHER_WIDTH + weight_kl * 3 * (p - q) @ weight
    expected = weight_feature * feature + weight_kl * kl
    torch.testing.assert_close(losses.total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad[:6].double(), gradient / 6, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.parts["feature_mse"].double(), feature, rtol=1e-5, atol=1e-6)
    assert set(losses.parts) == {"feature_mse"} | ({"soft_target_kl"} if weight_kl else set())
    assert classifier.weight.grad is None


def test_simkd_padding_gets_no_gradient(batch):
    student, teacher, target = batch
    z = student.embedding.nan_to_num(1.0).requires_grad_()
    teacher = Outputs(*(tensor.nan_to_num(2.0) for tensor in teacher[:2]))
    config = SimKDConfig(name="simkd", weight_kl=1.0)
    build(config)(student._replace(embedding=z), teacher, target).total.backward()
    assert (z.grad[6:] == 0).all()
    assert (z.grad[:6] != 0).all()


def test_simkd_copies_the_teachers_classifier_and_never_trains_it():
    classifier = torch.nn.Linear(TEACHER_WIDTH, CLASSES)
    distiller = build(SimKDConfig(name="simkd"), classifier=classifier)
    embedding = torch.randn(4, TEACHER_WIDTH)
    torch.testing.assert_close(distiller.head.classify(embedding), classifier(embedding))
    assert {name for name, _ in distiller.head.named_parameters()} == {
        "projector.weight",
        "norm.weight",
        "norm.bias",
    }
    assert not distiller.state_dict()
