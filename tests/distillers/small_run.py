"""Any method between two small networks whose answers are drawn at random: what every test of a method builds on."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from kdav_fast.config import MethodConfig
from kdav_fast.config.method import method_config, method_names, method_section
from kdav_fast.data.batch import Batch
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Facts, Progress, Shapes
from kdav_fast.distillers.phases import Measure
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import FoldableHead
from kdav_fast.student.trainee import Answer, Trainee
from tests.distillers import added_methods

CLASSES, IMAGES, BATCH = 5, 40, 8
STUDENT = Shapes("student", 6, ((4, 8, 8), (6, 4, 4)))
TEACHER = Shapes("teacher", 9, ((5, 8, 8), (9, 4, 4)))
LABELS = np.arange(IMAGES) % CLASSES
CPU = torch.device("cpu")


SMALL = {
    "cocord": {"hidden": 16, "width": 12, "predictor": 10, "queue": 20},
    "diffkd": {"width": 7},
}
"""Of methods whose modules are large whatever the networks are."""


def sections(name: str) -> dict[str, MethodConfig]:
    """A method's section with its defaults, and one for each other value of a key that has few, by what is changed.

    Of weights that are 0, the other value is 0.5. Keys that choose between ways to compute the same are left out.
    """
    small = {"name": name, **SMALL.get(name, {})}
    made = {"defaults": method_section(small)}
    for key, field in method_config(name).model_fields.items():
        values = ()
        if field.annotation is bool:
            values = (not field.default,)
        elif get_origin(field.annotation) is Literal and key != "impl":
            values = tuple(value for value in get_args(field.annotation) if value != field.default)
        elif field.annotation is float and field.default == 0:
            values = (0.5,)
        for value in values:
            try:
                made[f"{key}={value}"] = method_section({**small, key: value})
            except ValidationError:
                continue  # it goes with another key alone
    return made


def all_cases() -> dict[str, MethodConfig]:
    """The sections of every method there is, and of those that come with the tests, by method and what is changed."""
    with added_methods.added():
        return {f"{name}-{change}": one for name in method_names() for change, one in sections(name).items()}


def small_facts(
    config: MethodConfig, dtype: torch.dtype = torch.float32, label_smoothing: float = 0.0
) -> Facts:
    """Of two networks with the feature maps that a method asks for, and a teacher if it wants one."""
    staged = config.needs_stages or config.needs_preactivations
    student, teacher = (one if staged else one._replace(stages=()) for one in (STUDENT, TEACHER))
    taught = config.needs_teacher
    return Facts(
        student=student,
        teacher=teacher if taught else None,
        teacher_classifier=nn.Linear(TEACHER.features, CLASSES) if taught else None,
        labels=LABELS,
        classes=CLASSES,
        label_smoothing=label_smoothing,
        seed=0,
        dtype=dtype,
        device=CPU,
    )


class Sample(NamedTuple):
    """What a step is given: both networks' answers, and the batch."""

    student: Outputs
    teacher: Outputs | None
    batch: Batch

    def taken(self, rows: Tensor) -> "Sample":
        """The images of these rows alone."""
        views = self.batch.views

        def take(tensor: Tensor) -> Tensor:
            if len(tensor) == len(self.batch.labels):
                return tensor[rows]
            return tensor.unflatten(0, (views, -1))[:, rows].flatten(0, 1)

        return self._mapped(take)

    def spoilt(self, how: Literal["nan", "other"]) -> "Sample":
        """Something else in the rows of padding: no number, or that of other images."""
        generator = torch.Generator().manual_seed(99)

        def spoil(tensor: Tensor) -> Tensor:
            valid = self.batch.valid if len(tensor) == len(self.batch.valid) else self.batch.valid_rows
            if tensor.dtype == torch.bool:
                return tensor
            if not tensor.is_floating_point():
                return torch.where(valid, tensor, tensor.flip(0))  # of an image that there is
            noise = 3 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            filling = torch.full_like(tensor, torch.nan) if how == "nan" else noise
            return torch.where(valid.view(-1, *[1] * (tensor.ndim - 1)), tensor, filling)

        return self._mapped(spoil)

    def scaled(self, factor: float) -> "Sample":
        """With answers so many times as large."""
        student, teacher = (outputs and _map(outputs, lambda t: t * factor) for outputs in self[:2])
        return Sample(student, teacher, self.batch)

    def _mapped(self, change) -> "Sample":
        return Sample(*(part and _map(part, change) for part in self))


class SmallRun:
    """A method as a run builds it, the answers of its networks given.

    Normalisation is in evaluation mode: in training, rows of padding count in it whatever a method does.

    Args:
        config: the method's section.
        dtype: of the networks, hence of feature maps and of what is learned.
        seed: of everything that is random in the method.
        facts: what else than usual is known before training.
    """

    def __init__(
        self,
        config: MethodConfig,
        dtype: torch.dtype = torch.float32,
        label_smoothing: float = 0.0,
        seed: int = 0,
        facts: dict[str, object] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.config, self.dtype = config, dtype
        self.facts = small_facts(config, dtype, label_smoothing)._replace(**(facts or {}))
        torch.manual_seed(seed)
        self.distiller = build_distiller(config, self.facts)
        self.student = _Answering(self.distiller.head())
        modules = {name: one.module for name, one in self.distiller.learned().items()}
        autocast = None if dtype == torch.float32 else dtype
        before = self.distiller.before_student
        self.trainee = Trainee(self.student, modules, self.distiller, CPU, autocast, before).eval()
        self.distiller.meet(self.student)

    def sample(
        self, seed: int, rows: int = BATCH, padding: Sequence[int] = (), measuring: bool = False
    ) -> Sample:
        """Answers for a batch in the method's order; measuring sees one view."""
        generator = torch.Generator().manual_seed(seed)
        views = 1 if measuring else self.distiller.order.count
        index = torch.randperm(IMAGES, generator=generator)[:rows]
        valid = torch.ones(rows, dtype=torch.bool)
        valid[list(padding)] = False

        def draw(*shape: int) -> Tensor:
            return torch.randn(views * rows, *shape, generator=generator)

        batch = Batch(draw(3, 8, 8), torch.from_numpy(LABELS)[index], valid, index, views=views)
        head = self.student.head
        embedding = None if head is None else draw(head.width)
        student = self._outputs(STUDENT, draw, embedding)
        if head is not None:
            student = student._replace(logits=head.classify(embedding).detach())
            if head.on_maps:
                shown = head(torch.zeros(1, *STUDENT.stages[-1]))[1]
                student = student._replace(head_map=draw(*shown.shape[1:]).to(self.dtype))
        teacher = None if self.facts.teacher is None else self._outputs(TEACHER, draw)
        return Sample(student, teacher, batch)

    def _outputs(self, shapes: Shapes, draw, embedding: Tensor | None = None) -> Outputs:
        wanted = (
            self.config.needs_stages or self.config.needs_preactivations,
            self.config.needs_preactivations,
        )
        stages, preactivations = (
            tuple(draw(*shape).to(self.dtype) for shape in shapes.stages) if wants else () for wants in wanted
        )
        return Outputs(draw(shapes.features), draw(CLASSES), embedding, stages, preactivations)

    def go_through_phases(self, measured: Sequence[Sample], fitted: Sequence[Sample]) -> None:
        """What comes before distillation, on every rank of a group if there is one."""
        for phase in self.distiller.phases():
            if isinstance(phase, Measure):
                with torch.no_grad():
                    for sample in measured:
                        phase.see(sample.batch, sample.teacher)
                for summed in phase.sums:
                    _sum_over_ranks(summed)
                with torch.no_grad():
                    phase.finish()
                continue
            parameters = [p for name in phase.modules for p in self.trainee.learned[name].parameters()]
            for sample in fitted:
                loss = phase.loss(sample.teacher, sample.batch, self.trainee.learned).total
                gradients = torch.autograd.grad(loss * _weight(sample.batch), parameters, allow_unused=True)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            parameter -= 0.1 * _sum_over_ranks(gradient)

    def answer(self, sample: Sample, step: int = 0) -> tuple[Answer, dict[str, Tensor]]:
        """The loss of a step of 10, and its gradients: by what of the student's answers, or which parameter.

        On several ranks, of the mean over all their valid rows.
        """
        student = _map(sample.student, lambda tensor: tensor.detach().clone().requires_grad_())
        self.student.answers = student
        self.trainee.zero_grad()
        answer = self.trainee(sample.batch, sample.teacher, Progress(step, 10, step / 2, 5.0))
        (answer.total * _weight(sample.batch)).backward()
        self.distiller.after_step(self.student, self.trainee.learned)
        leaves = {**_named(student), **dict(self.trainee.named_parameters())}
        return answer, {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
            for name, leaf in leaves.items()
        }


class _Answering(nn.Module):
    """Stands for the student: says what it is told to."""

    def __init__(self, head: FoldableHead | None) -> None:
        super().__init__()
        self.head = head
        self.answers: Outputs | None = None

    def forward(self, images: Tensor) -> Outputs:
        return _map(self.answers, lambda tensor: tensor[: len(images)])

    def __deepcopy__(self, memo) -> "_Answering":
        """A copy is told the same."""
        return self


def _map(record, change):
    """A named tuple with its tensors changed, also those of the tuples in it."""

    def changed(value):
        if isinstance(value, Tensor):
            return change(value)
        return tuple(map(changed, value)) if isinstance(value, tuple) else value

    return type(record)(*map(changed, record))


def _named(outputs: Outputs) -> dict[str, Tensor]:
    named = {}
    for field, value in outputs._asdict().items():
        if isinstance(value, Tensor):
            named[field] = value
        named |= {
            f"{field}.{number}": each for number, each in enumerate(value if isinstance(value, tuple) else ())
        }
    return named


def _weight(batch: Batch) -> float:
    """Of this rank's mean in that over all ranks."""
    mine = batch.valid.sum().double()
    return float(mine / _sum_over_ranks(mine.clone()).clamp(min=1)) if dist.is_initialized() else 1.0


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
