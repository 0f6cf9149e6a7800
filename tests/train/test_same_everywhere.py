"""Hosts that have other files under the same paths are found, each process being one thread here."""

import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from kdav_fast.config import parse_config
from kdav_fast.data import open_images
from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import Cluster
from kdav_fast.train.same_everywhere import digest, require_same_network, same_images

WORLD = 3
NAMES = [f"rank {rank} (host h{rank})" for rank in range(WORLD)]


@dataclass(frozen=True)
class Threads(Cluster):
    """A cluster whose processes are threads."""

    shared: Any = None

    @property
    def names(self):
        return NAMES

    def gather(self, value):
        values, barrier = self.shared
        values[self.rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def on_first(self, action):
        return self.gather(action() if self.is_first else None)[0]


def on_all(action) -> list[str]:
    """What each rank raises, or nothing."""
    shared = [None] * WORLD, threading.Barrier(WORLD)
    outcomes = [""] * WORLD

    def run(rank: int) -> None:
        try:
            action(Threads(rank, WORLD, 0, 1, torch.device("cpu"), shared=shared))
        except InputError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


@pytest.fixture
def hosts(tmp_path):
    """The same small data set on every host."""
    for rank in range(WORLD):
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                folder = tmp_path / str(rank) / split / name
                folder.mkdir(parents=True)
                for number in range(2):
                    Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path


def open_on(hosts, rank: int):
    root = str(hosts / str(rank))
    return open_images(parse_config({"data": {"name": "folder", "root": root}}).data, 0)


def test_equal_images_and_what_the_first_process_found(hosts):
    found = {}
    assert on_all(lambda c: found.update({c.rank: same_images(c, open_on(hosts, c.rank))})) == [""] * WORLD
    assert found[0] == found[1] == found[2]
    assert found[0]["train"]["images"] == 4


def test_other_pixels_under_the_same_name_are_named_on_every_rank(hosts):
    path = hosts / "2" / "train" / "dog" / "1.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    lines = on_all(lambda c: same_images(c, open_on(hosts, c.rank)))
    assert len({*lines}) == 1
    assert lines[0].startswith(f"{NAMES[2]} reads other images than {NAMES[0]}")
    assert "dog/1.png has other content" in lines[0]


def test_a_missing_image_is_found_too(hosts):
    images = {rank: open_on(hosts, rank) for rank in range(WORLD)}
    (hosts / "1" / "val" / "cat" / "0.png").unlink()  # after the first process has listed them
    lines = on_all(lambda c: same_images(c, images[c.rank]))
    assert all(line.startswith(f"{NAMES[1]} reads other images") for line in lines)


def test_processes_of_one_host_look_once(hosts, monkeypatch):
    looked = []
    monkeypatch.setattr(
        "kdav_fast.train.same_everywhere.fingerprint", lambda splits: looked.append(threading.get_ident())
    )
    on_all(lambda c: same_images(replace(c, local_rank=c.rank), open_on(hosts, 0)))
    assert len(looked) == 1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(torch.float32)


@pytest.mark.parametrize("part", ["0.weight", "1.running_mean", "1.num_batches_tracked"])
def test_other_weights_are_named(part):
    networks = [network() for _ in range(WORLD)]
    assert on_all(lambda c: require_same_network(c, networks[c.rank], "teacher", None)) == [""] * WORLD
    networks[1].state_dict()[part].view(-1)[0] += 1
    lines = on_all(lambda c: require_same_network(c, networks[c.rank], "teacher", None))
    assert len({*lines}) == 1
    assert f"the checksum of the teacher's weights is {digest(networks[0])} on {NAMES[0]}" in lines[0]
    assert f"{digest(networks[1])} on {NAMES[1]}" in lines[0]


def test_another_precision_is_named():
    dtypes, one = [None, None, torch.bfloat16], network()
    lines = on_all(lambda c: require_same_network(c, one, "model", dtypes[c.rank]))
    assert "the model's precision is float32 on rank 0" in lines[0]
    assert f"bfloat16 on {NAMES[2]}" in lines[0]


def test_halves_have_a_checksum():
    assert digest(network().bfloat16()) != digest(network())
