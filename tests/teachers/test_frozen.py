"""The frozen teacher."""

import copy

import torch

from kdav_fast.data.batch import Batch
from kdav_fast.models import IMAGENET, Normalization, build_classifier, renormalization
from kdav_fast.teachers.frozen import FrozenTeacher


def test_teacher_sees_its_own_normalisation_and_never_changes():
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    plain = copy.deepcopy(network).eval()
    half = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    teacher = FrozenTeacher(network, renormalization(IMAGENET, half), torch.device("cpu"), None)
    teacher.train()
    pixels = torch.rand(4, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    rows = torch.arange(4)
    outputs = teacher(Batch((pixels - mean) / std, labels=rows, valid=rows >= 0, index=rows))
    with torch.no_grad():
        expected = plain((pixels - 0.5) / 0.5)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.features, expected.features, rtol=1e-4, atol=1e-5)
    assert not outputs.logits.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
