"""The optimizer, schedule and train sections."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdav_fast.config.section import (
    BetaParameter,
    Count,
    ExpandedPath,
    Fraction,
    Lenient,
    MayChange,
    NonNegative,
    OfMachine,
    Positive,
    Section,
)


class OptimizerConfig(Section):
    """Optimizer; the learning rate is for the whole (global) batch."""

    name: Literal["sgd", "adamw", "apex_sgd", "apex_adam", "apex_lamb", "apex_novograd"] = "sgd"
    """`apex_*`: of NVIDIA apex, on a GPU, where it is installed."""
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd` and `apex_sgd`, beta1 of the others."""
    nesterov: bool = False
    """Of `sgd` and `apex_sgd`."""
    weight_decay: NonNegative = 5e-4
    decay_norm_and_bias: bool = True
    """Whether weight decay also acts on biases and normalisation weights. Where it does not, `apex_lamb` takes them
    without its trust ratio too."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.nesterov and (self.name not in ("sgd", "apex_sgd") or self.momentum == 0):
            raise ValueError(
                f"optimizer.nesterov is true with optimizer.name '{self.name}' and optimizer.momentum "
                f"{self.momentum:g}; it needs sgd or apex_sgd and a momentum above 0: else leave it false"
            )
        return self


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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the networks; weights and loss stay in float32. `auto`: bf16 where the GPU has it, or where the
    CPU has and images are of 32 pixels or more, else fp32 (docs/precision.md); a run keeps what it began with. `fp16`
    scales the loss, so that small gradients do not vanish."""
    max_skipped_steps: MayChange[Count] = 20
    """A step whose loss or gradient is not finite is skipped; so many in a row stop the run."""
    cudnn_benchmark: bool = True
    """On a GPU, try cuDNN's convolutions at the first step and keep the fastest; shapes never change in a run."""
    keep_freed_memory: OfMachine[bool] = True
    """On a CPU with glibc, memory that a step frees stays with the process for the next one and does not go back to
    the system, unless the environment says otherwise (`MALLOC_*`, `GLIBC_TUNABLES`)."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all processes instead of each one's own."""
    zero_stage: MayChange[Annotated[int, Field(ge=0, le=3)]] = 0
    """How far DeepSpeed shards the student's training state: not, optimizer, gradients, weights."""
    deepspeed: MayChange[ExpandedPath | None] = None
    """JSON file with further settings of DeepSpeed, such as launch/deepspeed/overlap.json."""
    clip_grad_norm: NonNegative = 0.0
    """0: off."""
    label_smoothing: Fraction = 0.0
    mixup: BetaParameter = 0.0
    """Beta parameter, 0.01 to 1e6; 0: off."""
    cutmix: BetaParameter = 0.0
    """As `mixup`. With both on, each batch takes one of them by a coin flip."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Evaluate and save an exponential moving average of the weights; 0: off."""
    log_every: Count = 50
    """Optimizer steps between metric lines."""
    evaluate_every: NonNegative = 1.0
    """Epochs between evaluations; 0: only at the end."""
    save_every: NonNegative = 1.0
    """Epochs between checkpoints; 0: only when stopped by a signal."""
    keep_checkpoints: MayChange[Count] = 2
    """The newest ones to keep."""
    keep_best: MayChange[bool] = True
    """Keep, besides them, the checkpoint of the highest accuracy: of those saved where the run also evaluates."""
    async_checkpoints: MayChange[bool] = False
    """Write checkpoints while training goes on; a failure stops the run a little later."""
    comm_timeout: MayChange[Positive] = 600.0
    """Seconds that a process waits for another one's part of a step before the run is given up."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size ({self.batch_size}) is not a multiple of train.accumulate ({self.accumulate})"
            )
        return self
