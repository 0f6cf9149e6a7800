"""The learning rate against torch's own schedulers."""

import pytest
import torch
from torch.optim import lr_scheduler

from kdav_fast.config import ScheduleConfig
from kdav_fast.train.schedule import due, lr_factor

STEPS, STEPS_PER_EPOCH = 120, 12.0


def torch_curve(make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    curve = []
    for _ in range(STEPS):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return curve


def curve(**config):
    factor = lr_factor(ScheduleConfig(**config), STEPS, STEPS_PER_EPOCH)
    return [factor(step) for step in range(STEPS)]


def test_step():
    truth = torch_curve(lambda o: lr_scheduler.MultiStepLR(o, [36, 72], 0.1))
    assert curve(name="step", milestones=(3, 6)) == pytest.approx(truth)


def test_cosine():
    truth = torch_curve(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.01))
    assert curve(name="cosine", final=0.01) == pytest.approx(truth)


@pytest.mark.parametrize(("peak", "final"), [(0.3, 0.0), (0.15, 0.02)])
def test_one_cycle(peak, final):
    """As all schedules here, it would come to its end with the step after the last; torch's does with the last."""

    def one_step_longer(optimizer):
        start = (peak * STEPS + 1) / (STEPS + 1)  # torch counts the step of the peak too
        divisor = 1 / 25 / final if final else 1e12
        return lr_scheduler.OneCycleLR(
            optimizer, 1.0, total_steps=STEPS + 1, pct_start=start, final_div_factor=divisor
        )

    assert curve(name="one_cycle", peak=peak, final=final) == pytest.approx(
        torch_curve(one_step_longer), abs=1e-9
    )


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_warm_up_rises_in_equal_steps_and_then_hands_over(name):
    milestones = (9,) if name == "step" else ()
    values = curve(name=name, warmup_epochs=1, milestones=milestones)
    assert values[:12] == pytest.approx([(step + 1) / 12 for step in range(12)])
    assert values[12] == pytest.approx(1.0, abs=1e-3)


def test_constant():
    assert curve(name="constant") == [1.0] * STEPS


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        (0, []),
        (3, [3, 6, 9]),
        (2.5, [3, 5, 8, 10]),
        (100, []),
        (0.4, [*range(1, 11)]),
        (5e-324, [*range(1, 11)]),
    ],
)
def test_when_something_is_due(interval, steps):
    assert [step for step in range(1, 11) if due(step, interval)] == steps
