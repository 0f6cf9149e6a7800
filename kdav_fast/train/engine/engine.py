"""DeepSpeed around what is trained: the only file that runs it."""

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdav_fast.config import TrainConfig
from kdav_fast.errors import InputError, one_line
from kdav_fast.runtime.precision import LossScale
from kdav_fast.runtime.processes import Cluster, collective_timeout
from kdav_fast.student.trainee import Trainee
from kdav_fast.train.engine.settings import deepspeed_config, shows_in_log
from kdav_fast.train.engine.untouched import Untouched

_BUCKET_MB = 8
"""Of gradients: at most so much is still to be sent when the backward pass ends."""


def _import_deepspeed(device: torch.device):
    """DeepSpeed, quiet, on the run's device."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for this even of a single process
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Its shared-memory operator serves inference only, yet on a CPU it is compiled at start: half a minute
    # and a C++ compiler for nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def micro_batch_size(config: TrainConfig, world: int) -> int:
    """Images a rank takes through the networks at once."""
    return config.batch_size // (world * config.accumulate)


def start_engine(
    module: Trainee,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    cluster: Cluster,
    dtype: torch.dtype | None,
    beside: Iterable[nn.Module] = (),
) -> "Engine":
    """The engine for `config.zero_stage`.

    Args:
        module: what is trained, on the run's device; its parameters stay in float32.
        optimizer: over its parameters.
        config: batch size, accumulation, clipping and ZeRO stage.
        cluster: the run's processes.
        dtype: autocast dtype; None for float32.
        beside: modules that are not trained, but whose buffers change in a step.

    Raises:
        InputError: `config.deepspeed` names a file that cannot be used.
    """
    engine = WholeEngine if config.zero_stage == 0 else ShardedEngine
    return engine(module, optimizer, config, cluster, dtype, beside)


class Engine(ABC):
    """Forward, backward and optimizer step of what is trained. See `start_engine` for arguments.

    A step whose loss or gradient is not finite on any rank is skipped on all of them: weights, optimizer, BatchNorm
    statistics and all other buffers, `beside` too, stay as they were. At stage 0 nothing waits for the device to
    learn of it, unless the optimizer is one of apex's.

    Attributes:
        module: what is trained.
        optimizer: the one that was given.
        sharded: DeepSpeed's around it, which holds this rank's shard; None at stage 0.
        loss_scale: in force; 1 but for fp16.
    """

    def __init__(
        self,
        module: Trainee,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        cluster: Cluster,
        dtype: torch.dtype | None,
        beside: Iterable[nn.Module],
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.zero_stage = config.zero_stage
        self.loss_scale = LossScale(dtype, cluster.device)
        self._clip = config.clip_grad_norm
        self._deepspeed = _import_deepspeed(cluster.device)
        self._engine = self._initialize(config, cluster, dtype)
        self.sharded = None if self.zero_stage == 0 else self._engine.optimizer
        self._apply_loss_scale()
        self._buffers_of = [module, *beside]
        self.remember_buffers()

    def _initialize(self, config: TrainConfig, cluster: Cluster, dtype: torch.dtype | None) -> Any:
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        settings = deepspeed_config(config, micro_batch_size(config, cluster.world), dtype, trained)
        if shows_in_log(settings):
            self._deepspeed.utils.logger.setLevel(logging.INFO)
        try:
            engine, *_ = self._deepspeed.initialize(
                model=self.module, optimizer=self._handed(), dist_init_required=False, config=settings
            )
        except (
            ValueError,
            AssertionError,
            ImportError,
            OSError,
            self._deepspeed.DeepSpeedConfigError,
        ) as error:
            # Of the system's errors, those about a path that the file names, such as a monitor's folder.
            if config.deepspeed is None or (isinstance(error, OSError) and error.filename is None):
                raise
            raise InputError(
                f"DeepSpeed refuses the settings of train.deepspeed {config.deepspeed}: {one_line(error)}"
            ) from None
        if cluster.world > 1:
            # Its own group over all ranks has torch's half hour, whatever the default group has.
            engine.data_parallel_group.set_timeout(collective_timeout(config.comm_timeout))
        # Its loss scalers for fp16 judge each rank's part alone and do not lower the scale after a skipped step.
        engine.torch_autocast_z0_gradscaler = None
        engine.optimizer.torch_autocast_gradscaler = None
        return engine

    def _handed(self) -> torch.optim.Optimizer:
        """What DeepSpeed gets as optimizer."""
        return self.optimizer

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's own, in force."""
        return self._engine.config

    def __call__(self, *inputs: Any) -> Any:
        """What the module answers, for `backward`."""
        return self._answer(*inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of one micro-batch.

        Args:
            loss: scalar.
            last: of the optimizer step's micro-batches.
        """
        # From a loss that is not finite, gradients can be finite. NaN reaches every rank, in the sum over them.
        self._engine.backward(self._scaled(loss * (1.0 + 0.0 * loss.detach())))
        if not last:
            self._engine.step()  # only counts

    def step(self, lr: float, follow: Callable[[], None] | None = None) -> Tensor:
        """Take the optimizer step, after the last micro-batch.

        Args:
            lr: learning rate; each group of parameters takes its `lr_factor` of it.
            follow: what then brings buffers after the weights; called with whole weights.

        Returns:
            Whether it was taken or skipped, the same on all ranks: scalar, boolean, on the device.
        """
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        taken = self._step()
        if follow is not None:
            with self.whole_weights():
                follow()
        self._untouched.settle(taken)
        self.loss_scale.update(taken)
        self._apply_loss_scale()
        return taken

    def remember_buffers(self) -> None:
        """What a skipped step goes back to: call this after buffers were changed, or replaced, from outside."""
        self._untouched = Untouched(self._buffers_of)

    def restore_loss_scale(self, state: dict[str, Any]) -> None:
        """Continue with a saved `loss_scale.state_dict()`."""
        self.loss_scale.load_state_dict(state)
        self._apply_loss_scale()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, every rank's module has all its weights; every rank must enter. Not for forward passes."""
        if self.zero_stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer: groups of parameters and their settings."""
        return self.optimizer.param_groups

    def _answer(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    @abstractmethod
    def _scaled(self, loss: Tensor) -> Tensor:
        """Times the loss scale, unless DeepSpeed does that."""

    @abstractmethod
    def _step(self) -> Tensor:
        """Step unless a gradient is not finite; returns whether it did, as `step` does."""

    @abstractmethod
    def _apply_loss_scale(self) -> None:
        """Tell DeepSpeed the scale, if it needs to know."""


class WholeEngine(Engine):
    """ZeRO stage 0: every rank has all weights, gradients and optimizer state, and steps by itself.

    Of several ranks, torch adds up the gradients bucket by bucket while the backward pass goes on, where DeepSpeed
    begins when it is over.
    """

    def _initialize(self, config: TrainConfig, cluster: Cluster, dtype: torch.dtype | None) -> Any:
        engine = super()._initialize(config, cluster, dtype)
        # torch refuses these layers on a CPU, where they are ours and work.
        refused = cluster.device.type == "cpu" and any(
            isinstance(layer, nn.SyncBatchNorm) for layer in self.module.modules()
        )
        self._overlaps = cluster.world > 1 and not refused
        engine.enable_backward_allreduce = not self._overlaps
        return engine

    @cached_property
    def _replica(self) -> nn.parallel.DistributedDataParallel:
        """Made for the first step, since its buckets take the weights' layout, which is set after DeepSpeed's start."""
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        return nn.parallel.DistributedDataParallel(
            self._engine,
            broadcast_buffers=False,
            init_sync=False,  # by DeepSpeed
            bucket_cap_mb=_BUCKET_MB,
            gradient_as_bucket_view=True,
            # Else torch packs the buckets anew after the first step, and a run that continues adds in another order.
            find_unused_parameters=True,
        )

    def _answer(self, *inputs: Any) -> Any:
        if not self._overlaps:
            return super()._answer(*inputs)
        last = self._engine.is_gradient_accumulation_boundary()
        with nullcontext() if last else self._replica.no_sync():
            return self._replica(*inputs)

    def _handed(self) -> torch.optim.Optimizer:
        return _StepsElsewhere(self.optimizer.param_groups, {})

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * self.loss_scale.factor

    @torch.no_grad()
    def _step(self) -> Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        taken = norm.isfinite()
        self._rescale(gradients, norm)
        self._step_if(taken)
        self._engine.step()  # counts, and drops the gradients
        return taken

    def _rescale(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Unscale and clip, as the ZeRO optimizers do by themselves."""
        scale = self.loss_scale.factor.double()
        if self._clip > 0:
            factor = (self._clip / (norm / scale + 1e-6)).clamp(max=1.0) / scale
        elif self.loss_scale.active:
            factor = 1.0 / scale
        else:
            return
        torch._foreach_mul_(gradients, factor.float())

    def _step_if(self, taken: Tensor) -> None:
        optimizer = self.optimizer
        if not optimizer.defaults.get("fused"):
            if taken:  # apex's optimizers count their steps on the host: this waits
                optimizer.step()
            return
        # Of a first step that is skipped, torch's SGD would keep momentum that was never written.
        for group in optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                if parameter.grad is not None and parameter not in optimizer.state:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        # torch's kernels change nothing if it is 1: as torch.amp.GradScaler hands it over.
        optimizer.found_inf = (~taken).float()
        optimizer.step()

    def _apply_loss_scale(self) -> None:
        pass  # nobody else needs to know


class _StepsElsewhere(torch.optim.Optimizer):
    """For DeepSpeed, which at stage 0 would step whatever the gradients are: the same groups, and no step."""

    def step(self, closure: object = None) -> None:
        """Done by `WholeEngine`."""


class ShardedEngine(Engine):
    """ZeRO stages 1 to 3."""

    def _initialize(self, config: TrainConfig, cluster: Cluster, dtype: torch.dtype | None) -> Any:
        engine = super()._initialize(config, cluster, dtype)
        if self.zero_stage == 3:
            # The loss may use them without calling their modules. DeepSpeed notices that of a weight that is sharded at
            # that moment; a small one is whole after a restart and sharded after a save, and noticing it then is an
            # error.
            for parameter in self.module.learned.parameters():
                self._deepspeed.zero.register_external_parameter(self.module, parameter)
        return engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.sharded.param_groups

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss

    def _step(self) -> Tensor:
        self._engine.step()  # waits for the gradients' norm
        return torch.full((), not self.sharded.overflow, device=self.loss_scale.factor.device)

    def _apply_loss_scale(self) -> None:
        self.sharded.override_loss_scale(self.loss_scale.value if self.loss_scale.active else 1.0)


def shard_for_inference(network: nn.Module, cluster: Cluster) -> None:
    """Spread a network's weights over all ranks; each layer's come together when it is called (ZeRO-3).

    The network may lie in the host's memory: its weights cross to the device one by one. Every rank must then call
    it equally often.
    """
    deepspeed = _import_deepspeed(cluster.device)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 2**31,
    }
    deepspeed.zero.Init(module=network, config_dict_or_path=settings)
    for buffer in network.buffers():
        buffer.data = buffer.to(cluster.device)
    deepspeed.initialize(model=network, dist_init_required=False, config=settings)
