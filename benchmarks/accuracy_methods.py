"""What benchmarks/accuracy.py compares: the methods, and the two sizes of the comparison."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """What a student learns from."""

    distiller: dict[str, Any]
    """The config's distiller section."""
    init: str | None = None
    """Instead of the recipe's `model.init`."""
    lr: float | None = None
    """Instead of the preset's."""

    def but(self, **settings: Any) -> "Method":
        """With these settings of the distiller changed."""
        return replace(self, distiller=self.distiller | settings)


KDAV = Method(
    {
        "name": "kdav",
        "kappa_student": 10.0,
        "kappa_teacher": 10.0,
        "temperature": 1.0,
        "memory_length": 4096,
    }
)
SIMKD = Method({"name": "simkd", "weight_feature": 1.0, "weight_kl": 1.0, "temperature": 4.0})
KD = Method({"name": "kd", "temperature": 4.0, "weight_label": 0.1, "weight_kl": 0.9})
KAPPA_20 = KDAV.but(kappa_student=20.0, kappa_teacher=20.0)
MAIN = {
    "labels only": Method({"name": "none"}),
    "KD": KD,
    "SimKD": SIMKD,
    "KDAV": KDAV,
    "KDAV, kappa 20": KAPPA_20,
}
"""DESIGN's set-up; then the settings of KDAV that held-out images choose among VARIANTS."""
VARIANTS = {
    "KDAV, membership term only": KDAV.but(weight_prediction=0.0),
    "KDAV, prediction term only": KDAV.but(weight_membership=0.0),
    "KDAV, with labels (weight 0.1)": KDAV.but(weight_label=0.1),
    "KDAV, not centred": KDAV.but(center=False),
    "KDAV, class ids": KDAV.but(posterior="ids"),
    "KDAV, kappa 5": KDAV.but(kappa_student=5.0, kappa_teacher=5.0),
    "KDAV, temperature 2": KDAV.but(temperature=2.0),
    "KDAV, temperature 4": KDAV.but(temperature=4.0),
    "KDAV, memory 1024": KDAV.but(memory_length=1024),
    "KDAV, memory 16384": KDAV.but(memory_length=16384),
    "KDAV, weights 4": KDAV.but(weight_membership=4.0, weight_prediction=4.0),
    "KDAV, kappa 20, weights 4": KAPPA_20.but(weight_membership=4.0, weight_prediction=4.0),
    "SimKD, weights 4": SIMKD.but(weight_feature=4.0, weight_kl=4.0),
    "SimKD, temperature 2": SIMKD.but(temperature=2.0),
    "KDAV (He)": replace(KDAV, init="published"),
    "KD (He, lr 0.3)": replace(KD, init="published", lr=0.3),
    "SimKD (He, lr 0.3)": replace(SIMKD, init="published", lr=0.3),
    "KDAV (He, lr 0.3)": replace(KDAV, init="published", lr=0.3),
}
"""One setting changed at a time. "He": the ResNets' published initialisation (He et al., fan-out), whose weights are
larger by sqrt(6); then with a learning rate that suits it better."""


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
    "cpu": Preset(train_subset=25_000, epochs=12, seeds=3, variant_seeds=1, minutes=60.0),
    "full": Preset(train_subset=None, epochs=15, seeds=3, variant_seeds=2, minutes=8.0),
}


@dataclass(frozen=True)
class Task:
    """One student to train."""

    method: str
    """It says what the rest is."""
    seed: int
    distiller: dict[str, Any] = field(hash=False)
    init: str
    lr: float
    epochs: int


def tasks(preset: Preset, init: str, chosen: list[str] | None = None) -> list[Task]:
    """The students to train, in the order in which they are begun; `init` is the recipe's, `chosen` names methods."""
    seeds = [(MAIN, seed) for seed in range(preset.seeds)]
    seeds += [(VARIANTS, seed) for seed in range(preset.variant_seeds)]
    every = [
        Task(name, seed, method.distiller, method.init or init, method.lr or preset.lr, preset.epochs)
        for methods, seed in seeds
        for name, method in methods.items()
    ]
    return [task for task in every if chosen is None or task.method in chosen]
