"""A published method on features, run as a run does on its authors' inputs, weights and settings, in float64."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdav_fast.config.method import method_section
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import Shuffled
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, Shapes
from kdav_fast.models.outputs import Outputs
from tests.distillers.golden import load_golden

Agrees = Callable[[Tensor, Tensor], None]


class FeatureCase:
    """A golden case: its arrays as tensors, those with a gradient as leaves.

    Args:
        name: such as "AT_1".
        agrees: the fixture, which compares.
        suffix: of a further setting, such as "_cifar", whose totals and gradients are then meant.
        prefix: of a further step, such as "second_", whose arrays take the place of the first one's.
    """

    def __init__(self, name: str, agrees: Agrees, suffix: str = "", prefix: str = "") -> None:
        arrays, self.suffix, self._agrees = load_golden(name), suffix, agrees
        later = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        self.arrays = arrays | later
        self._tensors: dict[str, Tensor] = {}
        self._modules: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            tensor = torch.from_numpy(np.asarray(self.arrays[name]))
            self._tensors[name] = tensor.requires_grad_(self._gradient(name) is not None)
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def hyper(self, name: str) -> float:
        """A setting."""
        return float(self.arrays[f"hyper_{name}"])

    def numbered(self, name: str) -> tuple[Tensor, ...]:
        """`name`_0, `name`_1 and so on."""
        return tuple(
            self[f"{name}_{i}"]
            for i in range(sum(bool(re.fullmatch(rf"{name}_\d+", n)) for n in self.arrays))
        )

    def load(self, prefix: str, module: nn.Module) -> nn.Module:
        """Give a module the case's weights, and compare its gradients in `check`."""
        start = f"{prefix}."
        state = {
            name.removeprefix(start): torch.from_numpy(value)
            for name, value in self.arrays.items()
            if name.startswith(start)
        }
        missing = module.double().train().load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys), missing
        module.zero_grad()
        self._modules[prefix] = module
        return module

    def facts(self, student: Shapes, teacher: Shapes, **more: Any) -> Facts:
        """Of networks with these shapes."""
        labels = self.arrays.get("target", np.zeros(4, dtype=np.int64))
        classes = self.arrays["student_logits"].shape[1] if "student_logits" in self else 7
        known = {
            "teacher_classifier": None,
            "labels": labels,
            "classes": classes,
            "label_smoothing": 0.0,
            "seed": 0,
        }
        known |= {"dtype": torch.float64, "device": torch.device("cpu")}
        return Facts(student=student, teacher=teacher, **(known | more))

    def build(self, method: str, facts: Facts, **keys: Any) -> Distiller:
        """The method, with the case's settings as keys."""
        return build_distiller(method_section({"name": method, **keys}), facts).double()

    def outputs(self, who: str, features: Tensor | None = None, stages=(), preactivations=()) -> Outputs:
        """Of student or teacher; where the case has no logits, of some that do not count."""
        rows = len(stages[0] if features is None else features)
        logits = self[f"{who}_logits"] if f"{who}_logits" in self else torch.zeros(rows, 7).double()
        features = torch.zeros(rows, 1).double() if features is None else features
        return Outputs(features, logits, None, tuple(stages), tuple(preactivations))

    def batch(self, rows: int, views: int = 1) -> Batch:
        """All rows of it valid."""
        labels = self["target"] if "target" in self else torch.zeros(rows, dtype=torch.int64)
        index = torch.arange(rows)
        return Batch(
            torch.zeros(views * rows, 3, 8, 8), labels, torch.ones(rows, dtype=torch.bool), index, views=views
        )

    def run(
        self, distiller: Distiller, student: Outputs, teacher: Outputs, epoch: float = 0.0, **more: Any
    ) -> Losses:
        """A step, with what the method learns."""
        learned = {name: one.module for name, one in distiller.learned().items()}
        views = 1 if isinstance(distiller.order, Shuffled) else distiller.order.count
        batch = self.batch(len(student.logits) // views, views)._replace(**more)
        return distiller(student, teacher, batch, learned, Progress(0, 100, epoch, 240.0))

    def _gradient(self, name: str) -> Tensor | None:
        """With respect to an array, in this setting; None where there is none."""
        name = f"grad_{name.removesuffix(self.suffix) if self.suffix else name}{self.suffix}"
        return torch.from_numpy(self.arrays[name]) if name in self.arrays else None

    def check_value(self, found: Tensor, name: str) -> None:
        """Against the array of that name."""
        self._agrees(found, torch.from_numpy(np.asarray(self.arrays[name])))

    def check(
        self, total: Tensor, parts: dict[str, Tensor], *, names: dict[str, str], total_name: str | None = None
    ) -> None:
        """Total, parts and all gradients against the truth; `names`: those parts' names in the case."""
        self.check_value(total, total_name or f"loss{self.suffix}")
        for part, name in names.items():
            self.check_value(parts[part], name)
        total.backward()
        gradients = {name: self._gradient(name) for name in self._tensors}
        assert any(gradient is not None for gradient in gradients.values())
        for name, expected in gradients.items():
            if expected is not None:
                self._agrees(self[name].grad, expected)
        for prefix, module in self._modules.items():
            for key, parameter in module.named_parameters():
                if (name := f"gradnorm_{prefix}.{key}") in self.arrays and not self.suffix:
                    expected = torch.from_numpy(np.asarray(self.arrays[name]))
                    norm = expected.new_zeros(()) if parameter.grad is None else parameter.grad.norm()
                    torch.testing.assert_close(
                        norm,
                        expected,
                        rtol=1e-9,
                        atol=1e-10,
                        msg=lambda text, name=name: f"{name}: {text}",
                    )
