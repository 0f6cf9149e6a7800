"""What benchmarks/accuracy.py compares: the methods, and the two sizes of the comparison."""

from dataclasses import dataclass, field
from typing import Any

KDAV: dict[str, Any] = {
    "name": "kdav",
    "kappa_student": 10.0,
    "kappa_teacher": 10.0,
    "temperature": 1.0,
    "memory_length": 4096,
}
SHARPER = KDAV | {"kappa_student": 20.0, "kappa_teacher": 20.0}
MAIN: dict[str, dict[str, Any]] = {
    "labels only": {"name": "none"},
    "KD": {"name": "kd", "alpha": 0.9, "temperature": 4.0},
    "SimKD": {"name": "simkd", "weight_feature": 1.0, "weight_kl": 1.0, "temperature": 4.0},
    "KDAV": KDAV,
    "KDAV, kappa 20": SHARPER,
}
"""The methods by name, as in the config's distiller section. SimKD and "KDAV" have the settings of DESIGN's prototype;
with the package's training a kappa of 20 does better."""
VARIANTS: dict[str, dict[str, Any]] = {
    "SimKD, feature term only": {"name": "simkd"},
    "KDAV, both weights 4": KDAV | {"weight_membership": 4.0, "weight_prediction": 4.0},
    "KDAV, kappa 20, both weights 4": SHARPER | {"weight_membership": 4.0, "weight_prediction": 4.0},
    "KDAV, membership term only": KDAV | {"weight_prediction": 0.0},
    "KDAV, prediction term only": KDAV | {"weight_membership": 0.0},
    "KDAV, not centred": KDAV | {"center": False},
    "KDAV, class ids": KDAV | {"posterior": "ids"},
    "KDAV, with labels (weight 0.1)": KDAV | {"weight_label": 0.1},
    "KDAV, kappa 5": KDAV | {"kappa_student": 5.0, "kappa_teacher": 5.0},
    "KDAV, kappa 40": KDAV | {"kappa_student": 40.0, "kappa_teacher": 40.0},
    "KDAV, kappa 20, with labels (weight 0.1)": SHARPER | {"weight_label": 0.1},
    "KDAV, kappa 20, temperature 2": SHARPER | {"temperature": 2.0},
    "KDAV, kappa 20, temperature 4": SHARPER | {"temperature": 4.0},
    "KDAV, temperature 2": KDAV | {"temperature": 2.0},
    "KDAV, temperature 4": KDAV | {"temperature": 4.0},
    "KDAV, memory 1024": KDAV | {"memory_length": 1024},
    "KDAV, memory 16384": KDAV | {"memory_length": 16384},
}
"""One setting of a method changed at a time."""


@dataclass(frozen=True)
class Preset:
    """How much is trained. The networks are those of `launch/cifar10.yaml`."""

    train_subset: int | None
    """Images the students are trained on; None: all."""
    epochs: int
    seeds: int
    """Of the methods in MAIN."""
    variant_seeds: int
    minutes: float
    """No run is begun that would not end in them; the first seeds of all methods come first."""
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    compiled: bool = True


PRESETS = {
    # DESIGN section 2: 25,000 images, flips only, 12 epochs.
    "cpu": Preset(train_subset=25_000, epochs=12, seeds=3, variant_seeds=2, minutes=75.0),
    "full": Preset(train_subset=None, epochs=15, seeds=3, variant_seeds=2, minutes=8.0),
}


@dataclass(frozen=True)
class Task:
    """One student to train."""

    method: str
    """It says what the distiller's settings are."""
    seed: int
    distiller: dict[str, Any] = field(hash=False)


def tasks(preset: Preset, chosen: list[str] | None = None) -> list[Task]:
    """The students to train, in the order in which they are begun; `chosen` names methods."""
    every = [Task(name, seed, d) for seed in range(preset.seeds) for name, d in MAIN.items()]
    every += [Task(name, seed, d) for seed in range(preset.variant_seeds) for name, d in VARIANTS.items()]
    return [task for task in every if chosen is None or task.method in chosen]
