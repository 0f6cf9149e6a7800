"""The moving average of the student, against the formula and torch's own."""

import copy

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdav_fast.models import build_classifier
from kdav_fast.student.heads import EmbeddingHead
from kdav_fast.student.student import Student
from kdav_fast.train.average import StudentAverage

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


def students(count):
    """As training makes them: every parameter and buffer is another one in each."""
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.25)
    first = Student(network, EmbeddingHead(network.feature_width, 7, 10))
    for number in range(count):
        student = copy.deepcopy(first)
        for tensor in student.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(number))
        yield student


def test_the_average_is_torch_s():
    before, *later = students(5)
    mine = StudentAverage(before, 0.9)
    theirs = AveragedModel(before, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for student in later:
        mine.update(student, TAKEN)
        theirs.update_parameters(student)
        expected = theirs.state_dict()
        for name, tensor in mine.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
            elif name != "n_averaged":
                assert tensor == student.state_dict()[name.removeprefix("module.")]
    assert mine.n_averaged == theirs.n_averaged == 4


def test_a_skipped_step_does_not_count():
    before, first, second, third = students(4)
    with_them, without = (StudentAverage(before, 0.9) for _ in range(2))
    with_them.update(before, SKIPPED)
    for student in (first, second):
        with_them.update(student, TAKEN)
        with_them.update(student, SKIPPED)
        without.update(student, TAKEN)
    found, expected = with_them.state_dict(), without.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    with_them.update(third, TAKEN)
    assert not torch.equal(with_them.module.head.center, without.module.head.center)
