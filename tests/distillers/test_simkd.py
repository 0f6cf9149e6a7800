"""SimKD against its formula and the gradient by hand, in float64, padding left out."""

import pytest
import torch

from kdav_fast.models.outputs import Outputs
from tests.distillers.small_run import CLASSES, TEACHER


@pytest.mark.parametrize(("weight_feature", "weight_kl"), [(1.0, 0.0), (0.5, 2.0), (0.0, 1.0)])
def test_the_paper_s_feature_term_and_hinton_s(batch, build, losses, weight_feature, weight_kl):
    student, teacher, images = batch
    classifier = torch.nn.Linear(TEACHER.features, CLASSES)
    weights = {"weight_feature": weight_feature, "weight_kl": weight_kl, "temperature": 3.0}
    z = student.embedding.clone().requires_grad_()
    distiller = build("simkd", {"teacher_classifier": classifier}, **weights)
    found = losses(distiller, (student._replace(embedding=z), teacher, images))
    found.total.backward()

    # The gradient by hand: of the mean square 2 (z - t) / d, of the KL term T (p - q) through the classifier.
    weight, bias = classifier.weight.detach().double(), classifier.bias.detach().double()
    error = student.embedding[:6].double() - teacher.features[:6].double()
    p = torch.softmax((student.embedding[:6].double() @ weight.T + bias) / 3, 1)
    q = torch.softmax(teacher.logits[:6].double() / 3, 1)
    feature, kl = (error**2).sum() / (6 * TEACHER.features), 9 * (q * (q / p).log()).sum() / 6
    gradient = weight_feature * 2 * error / TEACHER.features + weight_kl * 3 * (p - q) @ weight
    expected = weight_feature * feature + weight_kl * kl
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad[:6].double(), gradient / 6, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.parts["feature_mse"].double(), feature, rtol=1e-5, atol=1e-6)
    assert set(found.parts) == {"feature_mse"} | ({"soft_target_kl"} if weight_kl else set())
    assert classifier.weight.grad is None


def test_padding_gets_no_gradient(batch, build, losses):
    student, teacher, images = batch
    z = student.embedding.nan_to_num(1.0).requires_grad_()
    teacher = Outputs(*(tensor.nan_to_num(2.0) for tensor in teacher[:2]))
    losses(build("simkd", weight_kl=1.0), (student._replace(embedding=z), teacher, images)).total.backward()
    assert (z.grad[6:] == 0).all()
    assert (z.grad[:6] != 0).all()


def test_the_teacher_s_classifier_is_copied_and_never_trained(build):
    classifier = torch.nn.Linear(TEACHER.features, CLASSES)
    distiller = build("simkd", {"teacher_classifier": classifier})
    embedding = torch.randn(4, TEACHER.features)
    torch.testing.assert_close(distiller.head().classify(embedding), classifier(embedding))
    assert {name for name, _ in distiller.head().named_parameters()} == {
        "projector.weight",
        "norm.weight",
        "norm.bias",
    }
    assert not distiller.state_dict()
