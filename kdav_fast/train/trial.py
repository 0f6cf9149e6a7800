"""A training step that is taken for nothing: what an input is too small for shows before the run."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from kdav_fast.errors import InputError, lack_of_memory
from kdav_fast.student.student import Student


@torch.no_grad()
def try_training_step(student: Student, image_size: int, rows: int) -> None:
    """Pass a blank batch forward in training mode; weights, statistics and random numbers stay what they were.

    Args:
        student: on the run's device.
        image_size: side of the run's images.
        rows: images over which BatchNorm takes its statistics. More than two change nothing, so two are the most used.

    Raises:
        InputError: the student cannot do it.
    """
    device = next(student.parameters()).device
    images = torch.zeros(min(rows, 2), 3, image_size, image_size, device=device)
    statistics = {name: buffer.clone() for name, buffer in student.named_buffers()}
    modes = [(module, module.training) for module in student.modules()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            functional_call(student.train(), statistics, (images,))
    except Exception as error:  # whatever the layers of a library say
        if lack_of_memory(error):
            raise
        if rows == 1 and "more than 1 value per channel" in str(error):
            raise InputError(
                f"{student.network.name} cannot train on one image at a time: its BatchNorm layers, or those of the "
                "embedding head, take the mean and variance of the images; raise train.batch_size to 2 or more a "
                "process and micro-batch"
            ) from error
        task = f"train on images of {image_size} x {image_size} pixels"
        raise student.network.unfit(task, error) from error
    finally:
        for module, mode in modes:
            module.training = mode


def check_learned(method: str, learned: dict[str, nn.Module], rows: int) -> None:
    """Raise `InputError` where modules beside the student take statistics of one image alone.

    Args:
        method: whose modules they are.
        learned: by name.
        rows: images over which BatchNorm takes its statistics.
    """
    for name, module in learned.items():
        if rows == 1 and any(isinstance(part, _BatchNorm) for part in module.modules()):
            raise InputError(
                f"distiller.name '{method}' cannot train on one image at a time: the BatchNorm layers of its module "
                f"'{name}' take the mean and variance of the images; raise train.batch_size to 2 or more a process and "
                "micro-batch"
            )
