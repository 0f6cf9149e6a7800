"""What the tests of each method's formula start from."""

import pytest
import torch

from kdav_fast.config.method import method_section
from kdav_fast.data.batch import Batch
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Progress
from kdav_fast.models.outputs import Outputs
from tests.distillers.small_run import BATCH, CLASSES, STUDENT, TEACHER, small_facts


@pytest.fixture
def batch():
    """Student's and teacher's answers and a batch whose last two rows are padding full of NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    student = Outputs(
        normal(BATCH, STUDENT.features), normal(BATCH, CLASSES), normal(BATCH, TEACHER.features)
    )
    teacher = Outputs(normal(BATCH, TEACHER.features) + 1, normal(BATCH, CLASSES))
    rows = torch.arange(BATCH)
    valid = rows < BATCH - 2
    for tensor in (*student[:3], *teacher[:2]):
        tensor[~valid] = torch.nan
    return student, teacher, Batch(torch.zeros(BATCH, 3, 8, 8), rows % CLASSES, valid, rows)


@pytest.fixture
def build():
    """Builds a method: `build("kd", alpha=0.5)`; what is known before training may be given as `facts`."""

    def build(name, facts=None, **keys):
        section = method_section({"name": name, **keys})
        return build_distiller(section, small_facts(section)._replace(**(facts or {})))

    return build


@pytest.fixture
def losses():
    """Takes the losses of a batch: `losses(distiller, batch)`."""

    def losses(distiller, batch, epoch=0.0):
        begun = distiller.before_student(*batch[1:])
        return distiller(*batch, {}, Progress(int(10 * epoch), 100, epoch, 10.0), *begun)

    return losses


@pytest.fixture
def agrees(record_property):
    """Compares float64 tensors with golden ones: `agrees(found, truth)`; the worst relative difference is recorded."""
    worst = 0.0

    def agrees(found, truth):
        nonlocal worst
        found, scale = found.detach(), truth.abs().max()
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12 * float(scale))
        if scale > 0:
            worst = max(worst, float((found - truth).abs().max() / scale))

    yield agrees
    record_property("worst_relative_difference", worst)
