"""What is trained as one module."""

import pytest
import torch
from torch import nn

from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Losses
from kdav_fast.models import build_classifier
from kdav_fast.runtime.precision import autocast
from kdav_fast.student.student import Student
from kdav_fast.student.trainee import Trainee

CPU = torch.device("cpu")


def four_images():
    rows = torch.arange(4)
    return Batch(torch.randn(4, 3, 16, 16), labels=rows, valid=rows >= 0, index=rows)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_networks_compute_in_the_run_s_dtype_and_the_loss_in_float32(dtype):
    seen = {}

    def loss(student, teacher, batch, learned, progress):
        projected = learned["projector"](student.features)
        product = student.features @ student.features.T
        seen.update(projected=projected, product=product, features=student.features, logits=student.logits)
        assert not torch.is_autocast_enabled("cpu")
        return Losses(
            projected.float().square().mean() + product.mean(), {"product": product.mean().detach()}
        )

    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    projector = nn.Linear(network.feature_width, 3)
    trainee = Trainee(Student(network), {"projector": projector}, loss, CPU, dtype)
    with autocast(CPU, dtype):
        answer = trainee(four_images(), None, None)
    exact = network.classifier.weight.dtype
    assert projector.weight.dtype == exact == torch.float32
    assert seen["projected"].dtype == (dtype or torch.float32)
    assert {seen[name].dtype for name in ("product", "features", "logits")} == {torch.float32}
    assert torch.equal(seen["product"], seen["features"] @ seen["features"].T)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(seen["product"], (seen["features"] @ seen["features"].T).float())
    assert torch.equal(seen["projected"], projector(seen["features"]))  # wherever it is called
    assert answer.total.requires_grad
    assert not answer.logits.requires_grad
    answer.total.backward()
    assert all(p.grad.dtype == torch.float32 for p in projector.parameters())


def answer_to(loss, learned=None, dtype=None):
    student = Student(build_classifier("cifar:resnet8", 10, width=0.25))
    return Trainee(student, learned or {}, loss, CPU, dtype)(four_images(), None, None)


def test_what_need_not_wait_for_the_student_is_begun_before_it():
    order = []

    def before(teacher, batch):
        order.append("before")
        return ("begun",)

    def loss(student, teacher, batch, learned, progress, begun):
        order.append(begun)
        return Losses(student.logits.mean(), {})

    student = Student(build_classifier("cifar:resnet8", 10, width=0.25))
    student.register_forward_pre_hook(lambda *_: order.append("student"))
    Trainee(student, {}, loss, CPU, None, before)(four_images(), None, None)
    assert order == ["before", "student", "begun"]


def test_modules_in_a_list_run_in_the_run_s_dtype_too():
    seen = []

    def loss(student, teacher, batch, learned, progress):
        seen.append(learned["projectors"][0](student.features).dtype)
        return Losses(student.logits.mean(), {})

    width = build_classifier("cifar:resnet8", 10, width=0.25).feature_width
    answer_to(loss, {"projectors": nn.ModuleList([nn.Linear(width, 3)])}, torch.bfloat16)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (lambda logits: logits.mean(), "gives a Tensor; give Losses"),
        (lambda logits: Losses(logits.mean(1), {}), r"has shape \(4,\)"),
        (lambda logits: Losses(logits.detach().mean(), {}), "depends on nothing that is trained"),
        (lambda logits: Losses(logits.mean(), {"part": 3.0}), "the part 'part'"),
        (lambda logits: Losses(logits.mean(), {"part": logits.mean(1)}), "the part 'part'"),
    ],
)
def test_what_is_no_loss_is_the_developer_s_mistake(losses, said):
    with pytest.raises(TypeError, match=said):
        answer_to(lambda student, *_: losses(student.logits))


def test_parts_for_the_log_keep_no_graph():
    answer = answer_to(lambda student, *_: Losses(student.logits.mean(), {"part": student.logits.mean()}))
    assert not answer.parts["part"].requires_grad
