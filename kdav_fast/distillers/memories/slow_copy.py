"""A copy of a module that follows it slowly."""

import copy

import torch
from torch import nn


def slow_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters are buffers, so that they are saved and not trained.

    Of its own buffers nothing but BatchNorm's count, which it asks for, is saved: statistics differ between ranks.
    """
    copied = copy.deepcopy(module)
    for part in copied.modules():
        part._non_persistent_buffers_set.update(part._buffers.keys() - {"num_batches_tracked"})
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, None if parameter is None else parameter.detach().clone())
    return copied


@torch.no_grad()
def follow(copied: nn.Module, module: nn.Module, momentum: float) -> None:
    """Parameters of the copy become momentum * old + (1 - momentum) * the module's, where shapes agree."""
    slow = dict(copied.named_buffers())
    for name, parameter in module.named_parameters():
        if slow[name].shape == parameter.shape:
            slow[name].lerp_(parameter, 1 - momentum)
