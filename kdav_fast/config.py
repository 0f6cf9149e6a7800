"""The one schema of a run: every key, its type, its default and what it may be combined with.

A config is a YAML file of these sections plus `key=value` overrides (`optimizer.lr=0.05`). Anything the
schema does not know stops at start, with the nearest key it does know.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdav_fast.errors import InputError

# YAML knows neither tuples nor paths: these two are made from lists and strings, all else is as given.
Lenient = Field(strict=False)
Triple = Annotated[tuple[float, float, float], Lenient]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
ExpandedPath = Annotated[Path, Lenient, AfterValidator(Path.expanduser)]
Range = Annotated[tuple[Positive, Positive], Lenient]


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number: YAML 1.1 wants 1.0e-3 and reads the former as text."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the images come from and what is done to them."""

    name: Literal["digits", "folder"] = "digits"
    """`digits`: scikit-learn's handwritten digits as PNG files; `folder`: a tree of class folders."""
    root: ExpandedPath | None = None
    """Folder that holds `train/CLASS/*.jpg` and `val/` or `test/`. For `digits`: the cache folder."""
    loader: Literal["dali", "torchvision"] = "dali"
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes. `auto`: on the GPU if there is one."""
    image_size: Count = 224
    """Side of the square that the networks see, in pixels."""
    crop: Literal["random_resized", "padded", "none"] = "random_resized"
    """Training crop: ImageNet's random area, CIFAR's shift by padding, or the whole image."""
    crop_area: Range = (0.08, 1.0)
    crop_aspect_ratio: Range = (0.75, 4 / 3)
    crop_padding: Count = 4
    """Pixels on each side for `crop: padded`."""
    flip: bool = True
    eval_resize: Count | None = None
    """Short side before the evaluation's centre crop. Default: image_size / 0.875 for
    `random_resized` training, image_size otherwise."""
    mean: Triple | None = None
    """RGB mean in 0..1. Default: what the model's weights expect, else ImageNet's."""
    std: Triple | None = None
    workers: Count | None = None
    """Decoding threads or processes a rank. Default: the rank's share of the cores."""
    train_subset: Count | None = None
    """Train on this many images, drawn once with the run's seed. Default: all."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.name == "folder" and self.root is None:
            raise ValueError(
                "data.root is needed when data.name is 'folder': give the folder that holds train/"
            )
        for key in ("crop_area", "crop_aspect_ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"data.{key} is [{low}, {high}]; the first must not exceed the second")
        if self.crop_area[1] > 1:
            raise ValueError(
                f"data.crop_area is {list(self.crop_area)}; areas are fractions of the image, at most 1"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std belong together; give both or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std is {list(self.std)}; every value must be above 0")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(
                f"data.eval_resize is {self.eval_resize}; it must be at least data.image_size ({self.image_size})"
            )
        return self


class ModelConfig(Section):
    """A network by name: `timm:NAME`, `torchvision:NAME` or `cifar:NAME`."""

    name: str = "cifar:resnet8"
    width: Positive = 1.0
    """Channel multiplier; `cifar:` networks only."""
    checkpoint: ExpandedPath | None = None
    """Weights: a safetensors or torch file, or the folder of a finished run."""
    pretrained: bool = False
    """Take the library's own weights (downloads them); `timm:` and `torchvision:` only."""
    mean: Triple | None = None
    """Input normalisation the weights expect. Default: as recorded with the weights, else the data's."""
    std: Triple | None = None
    compile: bool = False
    """Run through torch.compile."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("checkpoint and pretrained exclude each other; drop one of them")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or neither")
        return self


class TeacherConfig(ModelConfig):
    """The frozen network that teaches."""

    name: str


class NoDistiller(Section):
    """Labels only."""

    name: Literal["none"] = "none"


class KDConfig(Section):
    """Hinton's knowledge distillation: (1 - alpha) * CE + alpha * T^2 * KL."""

    name: Literal["kd"]
    alpha: Fraction = 0.9
    temperature: Positive = 4.0


class KDAVConfig(Section):
    """Knowledge distillation with an auxiliary variable; names follow `kdav_loss`."""

    name: Literal["kdav"]
    kappa_student: Positive = 10.0
    kappa_teacher: Positive = 10.0
    temperature: Positive = 1.0
    weight_membership: NonNegative = 1.0
    weight_prediction: NonNegative = 1.0
    memory_length: Count = 4096
    posterior: Literal["dense", "ids"] = "dense"
    """What the memory keeps of a remembered image: the teacher's class distribution or one class id."""
    center: bool = True
    """Centre teacher embeddings by their mean over the training set, measured before training."""
    prototypes: Literal["measured", "running"] = "measured"
    """Class means from one pass before training, or from running sums during training."""
    impl: Literal["auto", "reference", "chunked", "triton", "compile"] = "auto"

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.weight_membership == 0 and self.weight_prediction == 0:
            raise ValueError(
                "distiller.weight_membership and distiller.weight_prediction are both 0; raise one"
            )
        return self


DistillerConfig = Annotated[NoDistiller | KDConfig | KDAVConfig, Field(discriminator="name")]


class OptimizerConfig(Section):
    """Optimizer; the learning rate is for the whole (global) batch."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    """SGD's momentum, AdamW's beta1."""
    nesterov: bool = False
    weight_decay: NonNegative = 5e-4
    decay_norm_and_bias: bool = True
    """Whether weight decay also acts on biases and normalisation weights."""


class ScheduleConfig(Section):
    """Learning rate over the run, as a factor of `optimizer.lr`."""

    name: Literal["constant", "step", "cosine", "one_cycle"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    """Linear rise from 0 before `constant`, `step` and `cosine`."""
    milestones: Annotated[tuple[Positive, ...], Lenient] = ()
    """Epochs at which `step` multiplies by `gamma`."""
    gamma: Positive = 0.1
    peak: Fraction = 0.3
    """Share of the run after which `one_cycle` stands at its highest."""
    final: Fraction = 0.0
    """Factor at the end of `cosine` and `one_cycle`."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.name == "step" and not self.milestones:
            raise ValueError("schedule.milestones is empty; schedule.name 'step' needs the epochs to step at")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"schedule.milestones is {list(self.milestones)}; give them in rising order")
        if self.name == "one_cycle" and self.warmup_epochs:
            raise ValueError(
                "schedule.warmup_epochs does not go with 'one_cycle'; its own rise is schedule.peak"
            )
        return self


class TrainConfig(Section):
    """The loop."""

    epochs: Positive = 10.0
    """Passes over the training set; a fraction stops inside an epoch."""
    batch_size: Count = 128
    """Images an optimizer step over all ranks and accumulation steps."""
    accumulate: Count = 1
    """Micro-batches an optimizer step."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the GPU has it, else fp32."""
    zero_stage: Literal[0, 1, 2] = 0
    """How far DeepSpeed shards the student's training state."""
    clip_grad_norm: NonNegative = 0.0
    """0: off."""
    label_smoothing: Fraction = 0.0
    mixup: NonNegative = 0.0
    """Beta parameter; 0: off."""
    cutmix: NonNegative = 0.0
    """Beta parameter; 0: off. With both on, each batch takes one of them by a coin flip."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Evaluate and save an exponential moving average of the weights; 0: off."""
    log_every: Count = 50
    """Optimizer steps between metric lines."""
    evaluate_every: NonNegative = 1.0
    """Epochs between evaluations; 0: only at the end."""
    save_every: NonNegative = 1.0
    """Epochs between checkpoints; 0: only when stopped by a signal."""
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size ({self.batch_size}) is not a multiple of train.accumulate ({self.accumulate})"
            )
        return self


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
        if self.train.label_smoothing > 0 and self.distiller.name == "kdav":
            raise ValueError(
                "train.label_smoothing does not go with distiller.name 'kdav', which uses no labels"
            )
        mixing = self.train.mixup > 0 or self.train.cutmix > 0
        if mixing and isinstance(self.distiller, KDAVConfig) and self.distiller.prototypes == "running":
            raise ValueError(
                "distiller.prototypes is 'running' but train.mixup or train.cutmix is on: a mixed image has no "
                "class; use distiller.prototypes=measured"
            )
        return self


def load_config(path: Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and validate.

    Args:
        path: YAML file; `None` starts from the defaults.
        overrides: dotted keys with YAML values, such as `train.epochs=3` or `data.mean=[0.5,0.5,0.5]`.

    Raises:
        InputError: the file cannot be read, or a key or value is not in the schema.
    """
    raw = _read_yaml(path) if path else {}
    apply_overrides(raw, overrides)
    return parse_config(raw)


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> None:
    """Set `key=value` overrides in a plain dictionary; raises `InputError` for one that is not of that form."""
    for override in overrides:
        _apply_override(raw, override)


def parse_config(raw: dict[str, Any]) -> Config:
    """Validate a plain dictionary; raises `InputError` that names the first offending key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(_explain(error.errors()[0], raw)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"config {path} holds a {type(raw).__name__}; it must hold keys and values")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override '{override}' is not of the form key=value, such as train.epochs=3")
    try:
        value = yaml.load(text, _YamlLoader)
    except yaml.YAMLError:
        raise InputError(f"override '{override}': the value is not valid YAML") from None
    *sections, leaf = key.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise InputError(f"override '{override}': '{section}' is a value, not a section")
    if leaf == "name" and sections == ["distiller"] and node.get("name") != value:
        node.clear()  # another distiller's keys mean nothing to this one
    node[leaf] = value


_SECTIONS = {
    "data": [DataConfig],
    "model": [ModelConfig],
    "teacher": [TeacherConfig],
    "distiller": [NoDistiller, KDConfig, KDAVConfig],
    "optimizer": [OptimizerConfig],
    "schedule": [ScheduleConfig],
    "train": [TrainConfig],
}


def _known_keys() -> list[str]:
    keys = list(Config.model_fields)
    for section, models in _SECTIONS.items():
        keys += [f"{section}.{field}" for model in models for field in model.model_fields]
    return keys


def _explain(error: dict[str, Any], raw: dict[str, Any]) -> str:
    """One line for pydantic's first finding: the key, what was given, what is allowed."""
    # A discriminated union puts the chosen member's tag into the location; the user's key has no such part.
    location = [str(part) for part in error["loc"]]
    if len(location) > 1 and location[0] == "distiller" and location[1] in ("none", "kd", "kdav"):
        del location[1]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        allowed = _known_keys()
        if location[0] == "distiller" and isinstance(raw.get("distiller"), dict):
            chosen = raw["distiller"].get("name", "none")
            models = [
                m for m in _SECTIONS["distiller"] if chosen in m.model_fields["name"].annotation.__args__
            ]
            allowed = [f"distiller.{field}" for model in models for field in model.model_fields]
        near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.0)[0]
        return f"unknown key '{key}'; the nearest known one is '{near}'"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key in ("model", "teacher") else message
    if error["type"] == "missing":
        return f"'{key}' is missing; it must be given"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = error["input"].get("name") if isinstance(error["input"], dict) else error["input"]
        return f"distiller.name is {given!r}; allowed: 'none', 'kd', 'kdav'"
    return f"'{key}' is {error['input']!r}: {message[0].lower()}{message[1:]}"
