"""A program: steps of a student and what is learned beside it, at every ZeRO stage. python learned_steps.py FOLDER"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from kdav_fast.config import OptimizerConfig, TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Learned, Losses
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.student.student import Student
from kdav_fast.student.trainee import Trainee
from kdav_fast.train.engine.engine import start_engine
from kdav_fast.train.optimizer import build_optimizer

STEPS, ROWS, CLASSES = 4, 8, 4
OPTIMIZERS = {
    "sgd": {"name": "sgd", "weight_decay": 0.01, "decay_norm_and_bias": False},
    "sgd, all decayed": {"name": "sgd", "weight_decay": 0.01, "decay_norm_and_bias": True},
    "adamw": {"name": "adamw", "weight_decay": 0.01, "decay_norm_and_bias": False},
}


class Network(nn.Module):
    """A student of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, images: torch.Tensor) -> Outputs:
        features = self.first(images).tanh()
        return Outputs(features, self.last(features))


class Table(nn.Module):
    """Parameters for a loss to use; there is no forward pass of which ZeRO could hear."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.shift = nn.Parameter(torch.randn(CLASSES, 3)), nn.Parameter(torch.randn(3))


def build() -> tuple[Trainee, dict[str, Learned]]:
    torch.manual_seed(0)
    student = Student(Network())
    learned = {
        "projector": Learned(nn.Linear(5, 3), lr_factor=3.0, weight_decay=0.2),
        "table": Learned(Table(), lr_factor=0.5),
    }
    modules = {name: one.module for name, one in learned.items()}
    return Trainee(student, modules, loss, torch.device("cpu"), None), learned


def loss(student, teacher, batch, learned, progress) -> Losses:
    aim = learned["table"].rows[batch.labels] * learned["table"].shift
    distance = (learned["projector"](student.features) - aim).square().sum(1).mean()
    return Losses(F.cross_entropy(student.logits, batch.labels) + distance, {})


def batch_of(step: int, rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(ROWS, 6, generator=generator)[rows]
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)[rows]
    return Batch(images, labels, torch.ones_like(labels, dtype=torch.bool), torch.arange(len(labels)))


def lr_of(step: int) -> float:
    return 0.05 / (step + 1)


def main(folder: Path) -> None:
    cluster = start_cluster("cpu")
    file = folder / f"{cluster.rank}.json"  # weights as few as these would be kept whole
    file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    for name, options in OPTIMIZERS.items():
        for stage in range(4):
            trainee, learned = build()
            config = TrainConfig(batch_size=ROWS, zero_stage=stage, deepspeed=file if stage == 3 else None)
            optimizer = build_optimizer(OptimizerConfig(**options), trainee, learned)
            engine = start_engine(trainee, optimizer, config, cluster, None)
            assert stage < 3 or trainee.learned["table"].rows.numel() == 0  # it is elsewhere
            for step in range(STEPS):
                answer = engine(batch_of(step, slice(cluster.rank, None, cluster.world)), None, None)
                engine.backward(answer.total)
                assert engine.step(lr_of(step))
            with engine.whole_weights():
                weights = {key: tensor.clone() for key, tensor in trainee.state_dict().items()}
            if cluster.is_first:
                save_file(weights, folder / f"{name} {stage}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
