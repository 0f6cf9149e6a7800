"""A file of the user's own DeepSpeed settings: what it may say, and in which words it is refused."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdav_fast.config.documents import DocumentError, parse_json, read_document
from kdav_fast.errors import InputError, shown

DECIDED_BY = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip_grad_norm",
    "zero_optimization.stage": "train.zero_stage",
    "torch_autocast": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "data_types": "train.precision",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "gradient_allreduce_op": "the program",
    "zero_allow_untested_optimizer": "the program",
}
"""DeepSpeed's keys for what the run's config says, and where it says it."""
FREE = (
    "comet",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)
"""What a file may set at its top level. DeepSpeed would pass over a misspelt key without a word."""
LOGGED = ("comms_logger", "dump_state", "memory_breakdown", "wall_clock_breakdown")
"""Those that show in DeepSpeed's log, which is silent otherwise."""
_UNUSED = (
    "activation_checkpointing",
    "aio",
    "autotuning",
    "checkpoint",
    "compile",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "dataloader_drop_last",
    "disable_allgather",
    "eigenvalue",
    "elasticity",
    "expert_parallel",
    "graph_harvesting",
    "hybrid_engine",
    "nebula",
    "pipeline",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "weight_quantization",
    "zero_force_ds_cpu_optimizer",
)
"""Further keys of DeepSpeed, now or in earlier versions: here they may stand in a file as long as they are off."""
_NEAR = 0.75
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text",
    "dict": "keys and values",
    "model": "keys and values",
}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _FlopsProfiler(_Settings):
    """DeepSpeed reads these without a check."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


class _Scalars(_Settings):
    """Likewise."""

    communication_data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    dump_state: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    memory_breakdown: bool = False
    prescale_gradients: bool = False
    steps_per_print: Annotated[int, Field(ge=1)] = 10
    wall_clock_breakdown: bool = False


def read_settings(path: Path, decided: dict[str, Any]) -> dict[str, Any]:
    """What the file adds to a run's DeepSpeed settings, checked.

    What says the same as the run's config, is off, or is "auto", as in other programs' files, is left out.

    Args:
        path: a JSON file.
        decided: what the run's config says, under keys of `DECIDED_BY`.

    Raises:
        InputError: the file cannot be read, contradicts the config, or sets what it may not or what has no effect.
    """
    added = _without_auto(_read(path))
    zero = added.get("zero_optimization", {})
    if "stage" in zero:
        added["zero_optimization.stage"] = zero.pop("stage")
    for key, value in added.items():
        if key in DECIDED_BY:
            _require_agreement(path, key, value, decided)
        elif key not in FREE and not (key in _UNUSED and _is_off(value)):
            raise InputError(f"train.deepspeed {path} sets {_plain(key)}, which it may not; {_instead(key)}")
    settings = {
        key: value
        for key, value in added.items()
        if key in FREE and key != "zero_optimization" and not _says_nothing(value)
    }
    if zero := {key: value for key, value in zero.items() if "offload" not in key or not _is_off(value)}:
        settings["zero_optimization"] = zero
    _require_effect(path, settings, decided["zero_optimization.stage"])
    _check(path, settings)
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        added = parse_json(read_document(path))
    except OSError as error:
        raise InputError(f"train.deepspeed {path}: {error.strerror}; give the path of a JSON file") from None
    except DocumentError as error:
        raise InputError(f"train.deepspeed {path} {error}; mend it") from None
    if not isinstance(added, dict) or not isinstance(added.get("zero_optimization", {}), dict):
        raise InputError(
            f"train.deepspeed {path} and its zero_optimization must hold keys and values; mend it"
        )
    return added


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _is_off(value: Any) -> bool:
    """False, 0, nothing, a section that is not enabled, or one in which everything is off."""
    if isinstance(value, dict):
        switch = value.get("enabled", value.get("device"))
        return switch in (False, "none") or all(map(_is_off, value.values()))
    return value in (None, False, [], "none")


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, dict) and _is_off(value))


def _agree(given: Any, decided: Any) -> bool:
    if isinstance(decided, dict):
        section = {} if given is None else {"enabled": given} if isinstance(given, bool) else given
        return isinstance(section, dict) and _differing(section, decided) is None
    if isinstance(decided, tuple):
        return given in decided
    return given == decided and isinstance(given, bool) == isinstance(decided, bool)


def _differing(given: dict[str, Any], decided: dict[str, Any]) -> str | None:
    """The first key of a section that contradicts the run's config. In one that is off, nothing else counts."""
    if not _agree(given.get("enabled", decided["enabled"]), decided["enabled"]):
        return "enabled"
    inner = given if decided["enabled"] else {}
    return next(
        (k for k, v in inner.items() if not (_agree(v, decided[k]) if k in decided else _is_off(v))), None
    )


def _require_agreement(path: Path, key: str, given: Any, decided: dict[str, Any]) -> None:
    if _agree(given, decided[key]) if key in decided else _is_off(given):
        return
    known, by = decided.get(key), DECIDED_BY[key]
    if isinstance(given, dict) and isinstance(known, dict):
        inner = _differing(given, known)
        if inner == "enabled":
            here = f", which turns it {'on' if known['enabled'] else 'off'}"
        else:
            key, given = f"{key}.{inner}", given[inner]
            here = f", which gives {shown(known[inner])}" if inner in known else ""
    else:
        said = key in decided and key != "train_batch_size"  # the very key that it says to look at
        here = f", which gives {shown(known)}" if said and not isinstance(known, dict) else ""
    raise InputError(
        f"train.deepspeed {path} sets {key} to {shown(given)}, but {by} decides that{here}; "
        "remove it from the file"
    )


def _require_effect(path: Path, settings: dict[str, Any], stage: int) -> None:
    zero = settings.get("zero_optimization", {})
    if offloaded := sorted(key for key in zero if "offload" in key):
        raise InputError(
            f"train.deepspeed {path} sets zero_optimization.{offloaded[0]}, which needs an optimizer of DeepSpeed's "
            "own; remove it from the file"
        )
    if zero and stage == 0:
        raise InputError(
            f"train.deepspeed {path} sets zero_optimization.{next(iter(zero))}, which has no effect at "
            "train.zero_stage=0; set train.zero_stage=1, 2 or 3"
        )
    higher = sorted(key for key in zero if key.startswith("stage3_"))
    if higher and stage < 3:
        raise InputError(
            f"train.deepspeed {path} sets zero_optimization.{higher[0]}, which has no effect at "
            f"train.zero_stage={stage}; remove it from the file, or set train.zero_stage=3"
        )


def _plain(key: str) -> str:
    return shown(key)[1:-1]


def _instead(key: str) -> str:
    if key in _UNUSED:
        return "this program does not use it, so it must be off or not there"
    near = difflib.get_close_matches(key, FREE, n=1, cutoff=_NEAR)
    if near:
        return f"the nearest key that it may set is {near[0]}"
    return f"allowed: {', '.join(FREE)}"


def _check(path: Path, settings: dict[str, Any]) -> None:
    """Every section by its own schema: DeepSpeed's where it has one."""
    scalars = {key: value for key, value in settings.items() if key in _Scalars.model_fields}
    _validate(path, "", _Scalars, scalars)
    sections = {key: value for key, value in settings.items() if key not in scalars}
    for section, value in sections.items():
        if not isinstance(value, dict):
            raise InputError(
                f"train.deepspeed {path} sets {section} to {shown(value)}, but it is a section of keys and "
                "values; mend it"
            )
        _validate(path, section, _schema(section), value)


def _schema(section: str) -> type[BaseModel]:
    if section == "flops_profiler":
        return _FlopsProfiler
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }[section]


def _validate(path: Path, section: str, schema: type[BaseModel], value: dict[str, Any]) -> None:
    try:
        schema(**value)
    except ValidationError as error:
        wrong = _worded(error.errors(include_url=False)[0], section, schema)
    except (ValueError, TypeError, AssertionError) as error:
        wrong = f"{section}: {error}"
    else:
        return
    raise InputError(f"DeepSpeed refuses train.deepspeed {path}: {wrong}")


def _worded(finding: dict[str, Any], section: str, schema: type[BaseModel]) -> str:
    """Pydantic's finding: the key, what was given, what is allowed."""
    *inner, leaf = [section] * bool(section) + [str(part) for part in finding["loc"]] or [section]
    key = ".".join([*inner, leaf])
    if finding["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in schema.model_fields.items()]
        near = difflib.get_close_matches(leaf, known, n=1, cutoff=_NEAR) if len(inner) == 1 else []
        if near:
            return f"unknown key {shown(key)}; the nearest known one is '{section}.{near[0]}'"
        listed = f"; allowed in {section}: {', '.join(known)}" if len(inner) == 1 else "; remove it"
        return f"unknown key {shown(key)}{listed}"
    message = finding["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if finding["type"] in ("value_error", "assertion_error"):
        return message
    kind = _KINDS.get(finding["type"].partition("_")[0])
    allowed = kind or message.removeprefix("Input should be ").replace(
        "greater than", "a number greater than"
    )
    return f"'{key}' is {shown(finding['input'])}; allowed: {allowed}"
