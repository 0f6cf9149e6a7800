"""What is learned beside the student, against torch: rates, decay and weights that a loss uses directly."""

import pytest
import torch
from safetensors.torch import load_file

from tests.train import processes
from tests.train.learned_steps import OPTIMIZERS, STEPS, batch_of, build, lr_of

LEARNS = {
    "student.network.first.weight": (1.0, 0.01),
    "student.network.first.bias": (1.0, 0.01),
    "student.network.last.weight": (1.0, 0.01),
    "student.network.last.bias": (1.0, 0.01),
    "learned.projector.weight": (3.0, 0.2),
    "learned.projector.bias": (3.0, 0.2),
    "learned.table.rows": (0.5, 0.01),
    "learned.table.shift": (0.5, 0.01),
}
"""Of each parameter, which share of the learning rate it takes, and its weight decay."""
VECTORS = ("bias", "shift")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights after some steps of two processes, at every stage."""
    folder = tmp_path_factory.mktemp("learned")
    processes.run([str(processes.REPOSITORY / "tests/train/learned_steps.py"), str(folder)], 2)
    return lambda name, stage: load_file(folder / f"{name} {stage}.safetensors")


def expected(name):
    """The same steps in torch, in one process, each parameter in a group of its own."""
    trainee, _ = build()
    parameters = dict(trainee.named_parameters())
    assert parameters.keys() == LEARNS.keys()
    groups = [
        {"params": [parameters[key]], "weight_decay": 0.0 if _spared(name, key) else decay}
        for key, (_, decay) in LEARNS.items()
    ]
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999))
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    for step in range(STEPS):
        for group, (factor, _) in zip(optimizer.param_groups, LEARNS.values(), strict=True):
            group["lr"] = factor * lr_of(step)
        optimizer.zero_grad()
        trainee(batch_of(step), None, None).total.backward()
        optimizer.step()
    return trainee.state_dict()


def _spared(name, key):
    return "all decayed" not in name and key.endswith(VECTORS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_two_processes_are_torch_s_at_every_stage(trained, name):
    truth = expected(name)
    for stage in range(4):
        found = trained(name, stage)
        assert found.keys() == truth.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, truth[key], rtol=1e-5, atol=1e-6, msg=f"stage {stage}: {key}")
