"""Training of a method's own modules before the first step, on uneven shares of the images."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from kdav_fast.data import Batch
from kdav_fast.distillers.base import Losses, mean_over_valid
from kdav_fast.distillers.phases import Fit
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.phases import PhasePosition, run_phases
from tests.train import processes

VALUES = np.array([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]], dtype=np.float32)
VALID = np.array([[True, True, True], [True, False, False]])
"""Of a batch's three images, for each of two ranks."""
LR = 0.01


def fit(rank: int) -> tuple[list[float], float]:
    """The logged losses of two steps that draw a number to `VALUES`, and the number."""
    cluster = start_cluster(torch.device("cpu"), 60)
    number = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(number.weight)
    images = torch.from_numpy(VALUES[rank])[:, None]
    batch = Batch(images, torch.zeros(3, dtype=torch.int64), torch.from_numpy(VALID[rank]), torch.arange(3))

    def loss(teacher: None, batch: Batch, learned: dict[str, nn.Module]) -> Losses:
        rows = (learned["number"](torch.ones(3, 1)) - batch.images).square().sum(1)
        return Losses(mean_over_valid(rows, batch.valid), {})

    class Loader(list):
        batches_per_epoch = 2

    loader = Loader([batch, batch])
    trainee = SimpleNamespace(learned={"number": number}, zero_grad=lambda: None)
    run = SimpleNamespace(
        cluster=cluster,
        trainee=trainee,
        teacher=None,
        first_answers=None,
        distiller=SimpleNamespace(
            phases=lambda: [Fit("a number", ("number",), loss, 1.0, LR, momentum=0.0, weight_decay=0.0)]
        ),
        loaders=SimpleNamespace(training=lambda: loader, train=loader),
        config=SimpleNamespace(train=SimpleNamespace(log_every=1, save_every=0.0)),
    )
    logged = []

    def after_batch(position: PhasePosition, save_due: bool, values: dict[str, float]) -> bool:
        logged.append(values["before/a number/loss"])
        return False

    with cluster.liveness.naming_lost_ranks():
        run_phases(run, PhasePosition(), after_batch)
    return logged, number.weight.item()


def test_the_logged_loss_is_that_of_all_valid_images(tmp_path):
    processes.run([__file__, str(tmp_path)], 2)
    seen = VALUES[VALID]
    number, expected = 0.0, []
    for step in range(2):
        expected.append(np.mean((number - seen) ** 2))
        lr = LR * (1 + np.cos(np.pi * step / 2)) / 2
        number -= lr * np.mean(2 * (number - seen))
    for rank in range(2):
        logged, learned = json.loads((tmp_path / f"{rank}.json").read_text())
        np.testing.assert_allclose(logged, expected, rtol=1e-6)
        np.testing.assert_allclose(learned, number, rtol=1e-6)


if __name__ == "__main__":
    own = int(os.environ["RANK"])
    (Path(sys.argv[1]) / f"{own}.json").write_text(json.dumps(fit(own)))
