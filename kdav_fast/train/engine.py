"""DeepSpeed around the student: the only file that knows it, besides the checkpoints."""

import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from kdav_fast.config import TrainConfig
from kdav_fast.errors import InputError
from kdav_fast.train.deepspeed_config import deepspeed_config
from kdav_fast.train.distributed import Cluster


def _import_deepspeed(device: torch.device):
    """DeepSpeed, quiet, on the run's device."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for this even of a single process
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Its shared-memory operator serves inference only, yet on a CPU it is compiled at start: half a minute
    # and a C++ compiler for nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def micro_batch_size(config: TrainConfig, world: int) -> int:
    """Images a rank takes through the networks at once."""
    return config.batch_size // (world * config.accumulate)


def build_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_factor: Callable[[int], float],
    config: TrainConfig,
    cluster: Cluster,
    dtype: torch.dtype | None,
):
    """A DeepSpeed engine that trains `module`.

    Args:
        module: on the run's device; its parameters stay in float32.
        optimizer: over its parameters.
        lr_factor: learning-rate factor at each optimizer step.
        config: batch size, accumulation, clipping and ZeRO stage.
        cluster: the run's processes.
        dtype: autocast dtype; None for float32.

    Raises:
        InputError: `config.deepspeed` names a file that cannot be used.
    """
    deepspeed = _import_deepspeed(cluster.device)
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    settings = deepspeed_config(config, micro_batch_size(config, cluster.world), dtype)
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=lambda base: torch.optim.lr_scheduler.LambdaLR(base, lr_factor),
            dist_init_required=False,
            config=settings,
        )
    except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
        if config.deepspeed is None:
            raise
        raise InputError(
            f"DeepSpeed refuses the settings of train.deepspeed {config.deepspeed}: {' '.join(str(error).split())}"
        ) from None
    if config.zero_stage == 0:
        # Only now: DeepSpeed broadcasts weights as bytes, which it cannot do with channels_last strides. The
        # higher stages keep weights as views of one flat buffer, which have no such strides.
        module.to(memory_format=torch.channels_last)
    return engine


@torch.no_grad()
def average_buffers(module: nn.Module, world: int) -> None:
    """Make every rank hold the mean of all ranks' floating-point buffers.

    Each rank's BatchNorm statistics come from its own share of the batch and DeepSpeed never synchronises
    them. The head's class sums become means over ranks too, which leaves every prototype where it was.
    """
    if world == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world
