"""Freed memory stays with the process: the next step does not fetch its pages from the system again."""

import os
import platform
import subprocess
import sys

import pytest

from kdav_fast.train import setup
from kdav_fast.train.distributed import start_cluster

PROGRAM = """
import resource
import sys
import torch
from kdav_fast.models import build_classifier
from kdav_fast.train.host_memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
torch.manual_seed(0)
network = build_classifier("cifar:resnet8", 10, width=0.5)
optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
images, labels = torch.randn(128, 3, 32, 32), torch.arange(128) % 10

def step():
    loss = torch.nn.functional.cross_entropy(network(images).logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item().hex()

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
losses = [step() for _ in range(5)]
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, *losses)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def five_steps(what, **environment):
    """Of training: what `keep_freed_memory` said, page faults, losses."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    command = [sys.executable, "-c", PROGRAM, what]
    process = subprocess.run(command, capture_output=True, text=True, env=plain | environment, check=True)
    kept, faults, *losses = process.stdout.split()
    return kept, int(faults), losses


@glibc
def test_pages_are_fetched_once_and_losses_are_the_same():
    _, without, plain = five_steps("leave")
    kept, faults, losses = five_steps("keep")
    assert kept == "True"
    assert 5 * faults < without
    assert losses == plain


@glibc
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stands(name):
    value = {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}[name]
    assert five_steps("keep", **{name: value})[0] == "False"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_keeps_it_unless_told_not_to(small_config, tmp_path, monkeypatch, wanted):
    calls = []
    monkeypatch.setattr(setup, "keep_freed_memory", lambda: calls.append(1))
    setup.set_up(small_config(tmp_path / "run", train={"keep_freed_memory": wanted}), start_cluster("cpu"))
    assert len(calls) == wanted
