"""The whole config of a run, and what its sections may be combined with."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from kdav_fast.config.data import DataConfig
from kdav_fast.config.method import MethodConfig, NamedMethod, method_section
from kdav_fast.config.network import ModelConfig, TeacherConfig
from kdav_fast.config.section import ExpandedPath, MayChange, Section
from kdav_fast.config.training import OptimizerConfig, ScheduleConfig, TrainConfig


def _as_section(value: Any) -> Any:
    return method_section(value) if isinstance(value, dict) else value


class Sections(Section):
    """Every section of a run, of the method's own one only the name: what is validated without loading torch."""

    run_dir: MayChange[ExpandedPath] = Path("runs/default")
    device: MayChange[Literal["auto", "cpu", "cuda"]] = "auto"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    """The network that is trained: the student when there is a teacher."""
    teacher: TeacherConfig | None = None
    """Not used by methods without one, so that one file serves labels only as well."""
    distiller: NamedMethod = NamedMethod(name="none")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check_sharded_optimizer(self) -> Self:
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
        return self


class Config(Sections):
    """A whole run."""

    distiller: Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_as_section)] = Field(
        default_factory=lambda: method_section({"name": "none"})
    )
    """The method's own section: `Config` in `distillers/NAME.py`."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        method, train = self.distiller, self.train
        if method.needs_teacher and self.teacher is None:
            raise ValueError(f"distiller.name is '{method.name}' but there is no teacher; set teacher.name")
        method.check_run(train)
        method.check_data(self.data)
        if train.label_smoothing > 0 and not method.uses_labels:
            raise ValueError(
                f"train.label_smoothing does not go with distiller.name '{method.name}', which uses no labels; use "
                "train.label_smoothing=0"
            )
        if (train.mixup > 0 or train.cutmix > 0) and not method.takes_mixed:
            raise ValueError(
                f"train.mixup and train.cutmix do not go with distiller.name '{method.name}'; set them to 0"
            )
        return self
