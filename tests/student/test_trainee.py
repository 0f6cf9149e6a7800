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
    rows = torch.arange(4)
    batch = Batch(torch.randn(4, 3, 16, 16), labels=rows, valid=rows >= 0, index=rows)
    with autocast(CPU, dtype):
        answer = trainee(batch, None, None)
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
