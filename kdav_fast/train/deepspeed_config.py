"""What DeepSpeed is told: what the run's config decides, and what a file of the user's adds."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from kdav_fast.config import TrainConfig
from kdav_fast.errors import InputError

_DECIDED_BY = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip_grad_norm",
    "zero_optimization.stage": "train.zero_stage",
    "torch_autocast": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "zero_allow_untested_optimizer": "the program",
    "steps_per_print": "train.log_every",
}
"""DeepSpeed's keys for what the run's config says, and where it says it."""
_LARGEST_BUCKET = 500_000_000
_FREE = (
    "communication_data_type",
    "csv_monitor",
    "flops_profiler",
    "gradient_predivide_factor",
    "prescale_gradients",
    "tensorboard",
    "wandb",
    "zero_optimization",
)
"""What a file may set at its top level. DeepSpeed would pass over a misspelt key without a word."""


def deepspeed_config(
    config: TrainConfig, micro_batch: int, dtype: torch.dtype | None, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's config of a run.

    Args:
        config: the train section; the file `config.deepspeed` is merged in.
        micro_batch: images a rank takes through the networks at once.
        dtype: autocast dtype; None for float32.
        parameters: how many numbers are trained.

    Raises:
        InputError: the file cannot be read, or sets what it may not.
    """
    decided = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's SGD is not on DeepSpeed's list
        "torch_autocast": {
            "enabled": dtype is not None,
            "dtype": "float16" if dtype == torch.float16 else "bfloat16",
        },
        "steps_per_print": 2**31,  # the run has a log of its own
    }
    added = {} if config.deepspeed is None else _read(config.deepspeed)
    _require_free(added, decided, config.deepspeed)
    # DeepSpeed's buffer for gradients has room for half a billion, however small the student is: 2 GiB.
    defaults = {"reduce_bucket_size": min(parameters, _LARGEST_BUCKET)} if config.zero_stage > 0 else {}
    zero = {**defaults, **added.pop("zero_optimization", {}), **decided["zero_optimization"]}
    merged = {
        **decided,
        **{key: value for key, value in added.items() if key in _FREE},
        "zero_optimization": zero,
    }
    if config.zero_stage == 0:
        # `StudentEngine` needs the gradients' norm anyway; two clippings would measure it twice.
        merged["gradient_clipping"] = 0.0
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        added = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"train.deepspeed {path}: {error.strerror}; give the path of a JSON file") from None
    except ValueError as error:
        raise InputError(f"train.deepspeed {path} is not valid JSON: {error}; mend it") from None
    if not isinstance(added, dict) or not isinstance(added.get("zero_optimization", {}), dict):
        raise InputError(
            f"train.deepspeed {path} and its zero_optimization must hold keys and values; mend it"
        )
    return added


def _require_free(added: dict[str, Any], decided: dict[str, Any], path: Path | None) -> None:
    """Refuse what is decided elsewhere, unless it says the same or, as in other programs' files, "auto"."""
    given = {key: value for key, value in added.items() if key != "zero_optimization"}
    zero = added.get("zero_optimization", {})
    if "stage" in zero:
        given["zero_optimization.stage"] = zero["stage"]
    known = {**decided, "zero_optimization.stage": decided["zero_optimization"]["stage"]}
    for key, value in given.items():
        if key in _FREE or value == "auto" or (key in known and value == known[key]):
            continue
        if key in _DECIDED_BY:
            here = f", which gives {known[key]!r}" if key in known else ""
            raise InputError(
                f"train.deepspeed {path} sets {key} to {value!r}, but {_DECIDED_BY[key]} decides that{here}; "
                "remove it from the file"
            )
        near = difflib.get_close_matches(key, _FREE, n=1, cutoff=0.0)[0]
        raise InputError(
            f"train.deepspeed {path} sets {key}, which it may not; the nearest key that it may set is {near}"
        )
    if offloaded := sorted(key for key in zero if key.startswith("offload_")):
        raise InputError(
            f"train.deepspeed {path} sets zero_optimization.{offloaded[0]}, which needs an optimizer of DeepSpeed's "
            "own; remove it from the file"
        )
    if zero.keys() - {"stage"} and known["zero_optimization.stage"] == 0:
        raise InputError(
            f"train.deepspeed {path} sets zero_optimization, which has no effect at train.zero_stage=0; set "
            "train.zero_stage=1, 2 or 3"
        )
