"""The learning rate over a run, as a pure function of the step."""

import math
from collections.abc import Callable

from kdav_fast.config import ScheduleConfig

ONE_CYCLE_START = 1 / 25


def lr_factor(config: ScheduleConfig, steps: int, steps_per_epoch: float) -> Callable[[int], float]:
    """The factor of `optimizer.lr` at each optimizer step.

    Args:
        config: the schedule.
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps an epoch.

    Returns:
        A function of the step about to be taken, 0 .. steps - 1.
    """
    warmup = config.warmup_epochs * steps_per_epoch

    def with_warmup(after: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / warmup if step + 1 < warmup else after(step)

    def step_down(step: int) -> float:
        return config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)

    def cosine(step: int) -> float:
        return _anneal(1.0, config.final, (step - warmup) / max(1.0, steps - warmup))

    def one_cycle(step: int) -> float:
        top = config.peak * steps
        if step < top:
            return _anneal(ONE_CYCLE_START, 1.0, step / top)
        return _anneal(1.0, config.final, (step - top) / max(1.0, steps - top))

    if config.name == "one_cycle":
        return one_cycle
    return with_warmup({"constant": lambda step: 1.0, "step": step_down, "cosine": cosine}[config.name])


def due(step: int, interval: float) -> bool:
    """Whether a multiple of an interval lies between the last step and this one; an interval of 0 means never.

    Args:
        step: steps done, at least 1.
        interval: in steps; of less than one, every step is due.
    """
    interval = max(interval, 1.0) if interval > 0 else 0.0
    return interval > 0 and int(step / interval) > int((step - 1) / interval)


def _anneal(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end` while `progress` goes from 0 to 1."""
    progress = min(1.0, max(0.0, progress))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
