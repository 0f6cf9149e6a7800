"""The optimizer over the student's trained parameters."""

from collections.abc import Iterable

import torch
from torch import nn

from kdav_fast.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW on the parameters that require a gradient; torch's fused kernels on a GPU."""
    groups = _parameter_groups(module.named_parameters(), config)
    fused = all(p.is_cuda for p in module.parameters())
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused or None
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused or None)


def _parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict]:
    """Weights with decay; vectors (biases, normalisation) with it only if the config says so."""
    decayed, plain = [], []
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 or config.decay_norm_and_bias else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
