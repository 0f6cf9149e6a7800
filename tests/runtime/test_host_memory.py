"""Freed memory stays with a run's process: the next step does not fetch its pages from the system again."""

import ctypes
import json
import os
import platform
import resource
import sys
from pathlib import Path

import pytest
import torch

from kdav_fast.config import dump_config, load_config
from kdav_fast.models import build_classifier
from kdav_fast.runtime.host_memory import keep_freed_memory
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.setup import set_up
from tests.train import processes


def main(config: Path) -> None:
    """Train before and after a run is set up in this process."""
    before = five_steps()
    set_up(load_config(config), start_cluster("cpu"))
    print(json.dumps([before, five_steps(), is_mapped_alone()]))


def is_mapped_alone() -> bool:
    """Whether a block of 64 MiB has pages of its own, which go back to the system once it is freed."""

    class Mallinfo(ctypes.Structure):  # <malloc.h>: struct mallinfo2
        _fields_ = [
            *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
            *((f"not_used_{number}", ctypes.c_size_t) for number in range(5)),
        ]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    before = mallinfo().hblkhd
    block = torch.empty(2**26, dtype=torch.uint8)
    return mallinfo().hblkhd - before >= len(block)


def five_steps() -> tuple[int, list[str]]:
    """Of training, after a few in which the heap grows to what a step needs: pages fetched, losses."""
    torch.manual_seed(0)
    network = build_classifier("cifar:resnet8", 10, width=0.5)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    images, labels = torch.randn(128, 3, 32, 32), torch.arange(128) % 10

    def step() -> str:
        loss = torch.nn.functional.cross_entropy(network(images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item().hex()

    for _ in range(4):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    losses = [step() for _ in range(5)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, losses


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_fetches_pages_once_unless_told_not_to(small_config, tmp_path, monkeypatch, wanted):
    for name in (*filter(lambda name: name.startswith("MALLOC_"), os.environ), "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(small_config(tmp_path / "run", train={"keep_freed_memory": wanted})))
    [text] = processes.run([__file__, str(file)], 1)
    (without, plain), (fetched, losses), mapped_alone = json.loads(text.splitlines()[-1])
    assert mapped_alone != wanted
    if wanted:  # without the setting glibc may or may not: what lies at the heap's end decides
        assert 2 * fetched < without
    assert losses == plain


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")]
)
def test_what_the_environment_says_stands(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
