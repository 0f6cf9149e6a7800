"""The optimizer over the trained parameters of the student and of what is learned beside it."""

import math
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from kdav_fast.config import OptimizerConfig
from kdav_fast.distillers.base import Learned
from kdav_fast.errors import InputError, one_line
from kdav_fast.runtime.apex import APEX_BUILD, APEX_CLASSES
from kdav_fast.student.trainee import Trainee


def build_optimizer(
    config: OptimizerConfig, trainee: Trainee, learned: Mapping[str, Learned] = MappingProxyType({})
) -> torch.optim.Optimizer:
    """The optimizer on the parameters that require a gradient.

    torch's SGD and AdamW are fused: then they can be told on the device that a step must not be taken.

    Each of its groups says by `lr_factor` which share of the learning rate it takes.

    Args:
        config: the optimizer section.
        trainee: the student and what is learned beside it.
        learned: the learning-rate factor and weight decay of each module in `trainee.learned`.

    Raises:
        InputError: one of apex's is asked for, and apex or the GPU is missing.
    """
    groups = _groups(trainee.student, config, config.weight_decay, 1.0)
    for name, one in learned.items():
        decay = config.weight_decay if one.weight_decay is None else one.weight_decay
        groups += _groups(trainee.learned[name], config, decay, one.lr_factor)
    if config.name in APEX_CLASSES:
        optimizer = _import_apex(config.name, next(trainee.parameters()).device)
        return optimizer(groups, lr=config.lr, **_apex_settings(config))
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def _groups(module: nn.Module, config: OptimizerConfig, decay: float, lr_factor: float) -> list[dict]:
    """Weights with decay; vectors (biases, normalisation) with it only if the config says so."""
    decayed, plain = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 or config.decay_norm_and_bias else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": decay, "lr_factor": lr_factor},
        {"params": plain, "weight_decay": 0.0, "lr_factor": lr_factor},
    ]
    return [group for group in groups if group["params"]]


def _import_apex(name: str, device: torch.device) -> type[torch.optim.Optimizer]:
    """Apex's class; everything that is in its way is said at once."""
    faults, remedies = [], []
    if device.type != "cuda":
        faults.append(f"apex's optimizers need a GPU and the device is '{device.type}'")
        remedies.append("set device=cuda")
    try:
        optimizer = getattr(import_module("apex.optimizers"), APEX_CLASSES[name])
        import_module("amp_C")  # the kernels, without which apex can be installed too
    except (ImportError, AttributeError) as error:
        faults.append(f"apex's {APEX_CLASSES[name]} cannot be imported ({one_line(error)})")
        remedies.append(f"install apex {APEX_BUILD}")
    if faults:
        raise InputError(
            f"optimizer.name is '{name}', but {', and '.join(faults)}; use optimizer.name=sgd or adamw, or "
            f"{' and '.join(remedies)}"
        )
    return optimizer


def _apex_settings(config: OptimizerConfig) -> dict[str, Any]:
    """What decides the formula, written out: some of apex's defaults are not those of the papers."""
    if config.name == "apex_sgd":
        return {"momentum": config.momentum, "nesterov": config.nesterov, "wd_after_momentum": False}
    if config.name == "apex_novograd":
        return {
            "betas": (config.momentum, 0.98),
            "eps": 1e-8,
            # The gradient over its average norm, plus decay, enters the momentum. That average begins with the
            # first norm; apex would still correct it as if it began with 0, and take too small first steps.
            "reg_inside_moment": True,
            "grad_averaging": False,
            "init_zero": False,
            "bias_correction": False,
        }
    adam = {"betas": (config.momentum, 0.999), "bias_correction": True, "adam_w_mode": True}
    if config.name == "apex_adam":
        return {**adam, "eps": 1e-8}
    return {
        **adam,
        "eps": 1e-6,
        "grad_averaging": True,
        # By default it clips the gradient's norm to 1. No norm is above infinity; 0 would divide by 0.
        "max_grad_norm": math.inf,
        # False leaves the trust ratio out where weight decay is 0: meant for biases and normalisation, but
        # without any decay it would make LAMB plain Adam.
        "use_nvlamb": config.weight_decay == 0,
    }
