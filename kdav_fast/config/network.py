"""The model and teacher sections."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kdav_fast.config.section import ExpandedPath, MayChange, Positive, Section, Triple


class ModelConfig(Section):
    """A network by name: `timm:NAME`, `torchvision:NAME` or `cifar:NAME`."""

    name: str = "cifar:resnet8"
    width: Positive = 1.0
    """Channel multiplier; `cifar:` networks only."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further ones for the constructor of timm's or torchvision's network, such as `drop_path_rate` or `patch_size`.
    A network of one fixed image size is built for `data.image_size` without being told."""
    checkpoint: ExpandedPath | None = None
    """Weights: a safetensors or torch file, or the folder of a finished run."""
    pretrained: bool = False
    """Take the library's own weights (downloads them); `timm:` and `torchvision:` only."""
    init: Literal["published", "torch"] = "published"
    """How a network without weights starts: as its authors did, or with torch's smaller convolutions, which turn faster
    at the same learning rate."""
    reset_head: bool = False
    """Take the weights from checkpoint or pretrained but for the classifier, which starts anew: for other classes."""
    mean: Triple | None = None
    """Input normalisation the weights expect. Default: as recorded with the weights, else the data's."""
    std: Triple | None = None
    compile: bool = False
    """Run through torch.compile."""

    @field_validator("arguments")
    @classmethod
    def _plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, value in arguments.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(it, bool | int | float | str) for it in values):
                raise ValueError(
                    f"arguments.{name} is {value!r}; give numbers, true, false or words, alone or in a list, or drop it"
                )
        return arguments

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("checkpoint and pretrained exclude each other; drop one of them")
        if self.init != "published" and (self.checkpoint is not None or self.pretrained):
            raise ValueError(
                f"init '{self.init}' has no effect on weights from checkpoint or pretrained; drop one of them"
            )
        if self.reset_head and self.checkpoint is None and not self.pretrained:
            raise ValueError(
                "reset_head has no effect without checkpoint or pretrained, as the whole network starts anew; give one "
                "of them or drop it"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or neither")
        return self


class TeacherConfig(ModelConfig):
    """The frozen network that teaches."""

    name: str
    precision: Literal["train", "fp32", "bf16", "fp16"] = "train"
    """Number format it computes in. `train`: as `train.precision`; `bf16` also beside an fp32 student, at half the
    cost where the processor has it. Its answers are float32 in any case."""
    sharded: MayChange[bool] = False
    """Spread its weights over all processes (ZeRO-3 inference), for a teacher that does not fit on one GPU."""

    @model_validator(mode="after")
    def _has_its_head(self) -> Self:
        if self.reset_head:
            raise ValueError(
                "reset_head would leave a teacher whose class scores are random; train one for these classes first: "
                "'kdav train' with model.reset_head"
            )
        return self
