"""The heads: class means taken by hand in float64, the teacher's own classifier, and what both fold into."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdav_fast import EmbeddingHead
from kdav_fast.errors import InputError
from kdav_fast.student.heads import ManyToOneHead, ReusedClassifierHead


@pytest.fixture
def head():
    """A head in a trained state: moved BatchNorm statistics and affine parameters, observed prototypes."""
    torch.manual_seed(0)
    head = trained(EmbeddingHead(6, 9, 4))
    head.observe(torch.randn(40, 9) + 3, torch.arange(40) % 4)
    head.set_center()
    return head


@torch.no_grad()
def trained(head):
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.1, 4)
    head.norm.weight.normal_()
    head.norm.bias.normal_()
    return head.eval()


def test_prototypes_are_directions_of_centred_class_means(head):
    torch.manual_seed(1)
    fresh = EmbeddingHead(6, 9, 4)
    embeddings, labels = torch.randn(50, 9) + 2, torch.randint(4, (50,))
    for start in range(0, 50, 7):
        fresh.observe(embeddings[start : start + 7], labels[start : start + 7])
    fresh.set_center()
    center = embeddings.double().mean(0)
    torch.testing.assert_close(fresh.center.double(), center, rtol=1e-6, atol=1e-6)
    means = torch.stack([embeddings[labels == y].double().mean(0) for y in range(4)])
    torch.testing.assert_close(fresh.prototypes(), F.normalize(means - center, dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fresh.center_teacher(embeddings).mean(0), torch.zeros(9), rtol=0, atol=1e-5)


def test_class_probabilities_weight_the_means():
    embeddings, probabilities = torch.randn(20, 9), torch.softmax(torch.randn(20, 4), 1)
    head = EmbeddingHead(6, 9, 4)
    head.observe(embeddings, probabilities)
    expected = F.normalize(probabilities.double().T @ embeddings.double(), dim=1)
    torch.testing.assert_close(head.prototypes(), expected)


def test_folding_draws_no_random_numbers(head):
    """A run folds the head whenever it saves; what it draws later must not depend on that."""
    before = torch.get_rng_state()
    head.fold()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_that_observed_nothing_folds_into_nothing():
    with pytest.raises(InputError, match=r"no teacher embedding was observed.*call observe\("):
        EmbeddingHead(6, 9, 4).fold()


def test_the_example_of_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = text.split("## From Python")[1].split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    labels = torch.arange(2000) % 1000
    teacher_features = F.one_hot(labels, 1000).float() @ torch.randn(1000, 512)
    names = {
        "labels": labels,
        "teacher_features": teacher_features,
        "teacher_logits": 9 * F.one_hot(labels, 1000).float(),
        "student_features": teacher_features + 0.1 * torch.randn(2000, 512),
    }
    exec(example, names)
    head, features = names["head"].eval(), names["student_features"]
    scores, expected = names["linear"](features), head.classify(head(features))
    assert head.projector.weight.grad.abs().max() > 0
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_fold_is_the_same_classifier(head):
    features = torch.randn(200, 6)
    with torch.no_grad():
        scores = head.classify(head(features))
        folded = head.fold()(features)
    torch.testing.assert_close(folded, scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(folded.argmax(1), scores.argmax(1))


def test_fold_is_exact_in_float64(head):
    head, features = head.double(), torch.randn(200, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            head.fold()(features), head.classify(head(features)), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("bias", [True, False])
def test_the_reused_classifier_folds_exactly_in_float64(bias):
    torch.manual_seed(0)
    classifier = torch.nn.Linear(9, 4, bias=bias).double()
    head = trained(ReusedClassifierHead(6, 9, 4).double())
    head.reuse(classifier)
    features = torch.randn(200, 6, dtype=torch.float64)
    with torch.no_grad():
        scores = classifier(head(features))
        torch.testing.assert_close(head.classify(head(features)), scores, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(head.fold()(features), scores, rtol=1e-12, atol=1e-12)


def test_the_length_of_z_does_not_change_the_class(head):
    embedding = head(torch.randn(100, 6))
    on_the_sphere = head.classify(F.normalize(embedding, dim=1))
    assert torch.equal(on_the_sphere.argmax(1), head.classify(embedding).argmax(1))


def test_state_restores_exactly(head):
    other = EmbeddingHead(6, 9, 4).eval()
    other.load_state_dict(head.state_dict())
    features = torch.randn(5, 6)
    assert torch.equal(other.classify(other(features)), head.classify(head(features)))


def test_class_never_observed_scores_zero():
    head = EmbeddingHead(6, 9, 3).eval()
    head.observe(torch.randn(10, 9), torch.arange(10) % 2)
    assert (head.classify(head(torch.randn(5, 6)))[:, 2] == 0).all()


def test_errors():
    with pytest.raises(InputError, match="classes is 0"):
        EmbeddingHead(6, 9, 0)
    with pytest.raises(InputError, match="ReusedClassifierHead: teacher_width is 0"):
        ReusedClassifierHead(6, 0, 4)
    with pytest.raises(InputError, match="no teacher embedding was observed"):
        EmbeddingHead(6, 9, 4).set_center()


@torch.no_grad()
def test_a_head_on_maps_folds_into_what_it_answers_for_their_mean():
    torch.manual_seed(0)
    head = ManyToOneHead(6, 4, 5, copies=3)
    for norm in (head.expand[1], head.reduce[1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4)
        norm.weight.normal_()
        norm.bias.normal_()
    maps = torch.randn(7, 6, 3, 2)
    embedding, expanded = head.eval()(maps)
    assert expanded.shape == (7, 12, 3, 2)
    scores = head.fold()(maps.mean((2, 3)))
    torch.testing.assert_close(scores, head.classify(embedding), rtol=1e-4, atol=1e-5)
