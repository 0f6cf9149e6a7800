"""The whole config of a run, and what its sections may be combined with."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from kdav_fast.config.data import DataConfig
from kdav_fast.config.distiller import DistillerConfig, KDAVConfig, NoDistiller
from kdav_fast.config.network import ModelConfig, TeacherConfig
from kdav_fast.config.section import ExpandedPath, Section
from kdav_fast.config.training import OptimizerConfig, ScheduleConfig, TrainConfig


class Config(Section):
    """A whole run."""

    run_dir: ExpandedPath = Path("runs/default")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    """The network that is trained: the student when there is a teacher."""
    teacher: TeacherConfig | None = None
    """Not used by `distiller.name=none`, so that one file serves labels only as well."""
    distiller: DistillerConfig = NoDistiller()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.distiller.name != "none" and self.teacher is None:
            raise ValueError(
                f"distiller.name is '{self.distiller.name}' but there is no teacher; set teacher.name"
            )
        uses_labels = self.distiller.name in ("none", "kd") or getattr(self.distiller, "weight_label", 0) > 0
        if self.train.label_smoothing > 0 and not uses_labels:
            raise ValueError(
                f"train.label_smoothing does not go with distiller.name '{self.distiller.name}', which uses no labels; "
                "use train.label_smoothing=0, or, with kdav, distiller.weight_label above 0"
            )
        mixing = self.train.mixup > 0 or self.train.cutmix > 0
        if mixing and isinstance(self.distiller, KDAVConfig) and self.distiller.prototypes == "running":
            raise ValueError(
                "distiller.prototypes is 'running' but train.mixup or train.cutmix is on: a mixed image has no "
                "class; use distiller.prototypes=measured"
            )
        self._check_memory()
        self._check_sharded_optimizer()
        return self

    def _check_memory(self) -> None:
        images = self.train.batch_size // self.train.accumulate
        if isinstance(self.distiller, KDAVConfig) and self.distiller.memory_length < images:
            raise ValueError(
                f"distiller.memory_length is {self.distiller.memory_length}, but {images} images enter the memory at "
                "once (train.batch_size / train.accumulate), and each must be among its candidates; use at least that"
            )

    def _check_sharded_optimizer(self) -> None:
        given = f"optimizer.name is '{self.optimizer.name}' but train.zero_stage is {self.train.zero_stage}"
        if self.train.zero_stage > 0 and self.optimizer.name in ("apex_lamb", "apex_novograd"):
            raise ValueError(
                f"{given}: it scales each layer by that layer's norm, and ZeRO hands it flat shards without layers; "
                "use train.zero_stage=0, or optimizer.name=sgd, adamw or apex_sgd"
            )
        if self.train.zero_stage == 3 and self.optimizer.name == "apex_adam":
            raise ValueError(
                f"{given}: it counts a group's steps, and stage 3 may take one in several pieces, each of which would "
                "count; use optimizer.name=adamw, or train.zero_stage=0, 1 or 2"
            )
