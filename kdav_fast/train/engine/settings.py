"""What DeepSpeed is told: what the run's config decides, and what a file of the user's adds."""

from typing import Any

import torch

from kdav_fast.config import TrainConfig
from kdav_fast.train.engine.file import LOGGED, read_settings

_LARGEST_BUCKET = 500_000_000
_NAMES = {
    torch.float16: ("float16", "fp16", "torch.float16"),
    torch.bfloat16: ("bfloat16", "bf16", "torch.bfloat16"),
}


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
    settings = {
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
        # Its own timer waits for the device twice a step.
        "timers": {"throughput": {"enabled": False}},
    }
    added = (
        {} if config.deepspeed is None else read_settings(config.deepspeed, _decided(config, settings, dtype))
    )
    # DeepSpeed's buffer for gradients has room for half a billion, however small the student is: 2 GiB.
    defaults = {"reduce_bucket_size": min(parameters, _LARGEST_BUCKET)} if config.zero_stage > 0 else {}
    zero = {**defaults, **added.get("zero_optimization", {}), **settings["zero_optimization"]}
    merged = {**settings, **added, "zero_optimization": zero}
    if config.zero_stage == 0:
        # `WholeEngine` needs the gradients' norm anyway; two clippings would measure it twice.
        merged["gradient_clipping"] = 0.0
    return merged


def shows_in_log(settings: dict[str, Any]) -> bool:
    """Whether something in DeepSpeed's config is for its log, which is silent otherwise."""
    return any(settings.get(key) for key in LOGGED)


def _decided(config: TrainConfig, settings: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """What the run's config says, under every key of DeepSpeed's that can say it."""
    scaling = {"loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1, "loss_scale_window": 2000}
    return {
        **settings,
        "train_batch_size": config.batch_size,
        "zero_optimization.stage": config.zero_stage,
        "torch_autocast": {"enabled": dtype is not None, "dtype": _NAMES.get(dtype)},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16, **scaling},
        "amp": {"enabled": False},
        "gradient_allreduce_op": "mean",
    }
