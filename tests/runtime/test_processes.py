"""What a launcher sets, wrongly set: one line from whichever process, and no wait without end."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdav_fast.cli import main
from kdav_fast.errors import InputError, RankLostError
from kdav_fast.runtime import meeting
from kdav_fast.runtime.meeting import Meeting
from kdav_fast.runtime.processes import Cluster, collective_timeout, start_cluster


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; the others of a launcher are not set."""

    def set_to(**variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


WRONG = [
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'; it must be a whole number"),
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
    ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3 and WORLD_SIZE is 2; ranks are 0 to WORLD_SIZE - 1"),
    ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
    ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two'"),
]


@pytest.mark.parametrize(("variables", "said"), WRONG)
def test_numbers_that_make_no_sense(environment, variables, said):
    environment(**variables)
    with pytest.raises(InputError) as error:
        start_cluster("cpu")
    assert said in str(error.value)


@pytest.mark.parametrize(("variables", "said"), WRONG)
def test_they_are_told_whatever_the_rank(environment, capsys, small_config, tmp_path, variables, said):
    environment(**variables)
    path = tmp_path / "config.yaml"
    path.write_text("distiller: {name: none}")
    assert main(["train", str(path), f"run_dir={tmp_path / 'run'}", "device=cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if said in line and line.startswith("kdav: error: ")]) == 1


def test_a_name_that_nobody_knows(environment, monkeypatch):
    monkeypatch.setattr(meeting, "_NAMING", 0.1)
    environment(MASTER_ADDR="no.such.host.invalid", MASTER_PORT="29500")
    with pytest.raises(
        InputError, match=r"MASTER_ADDR is 'no\.such\.host\.invalid', which cannot be looked up"
    ):
        Meeting(0, 2, 20.0)


def test_another_program_s_server_that_says_nothing(environment, monkeypatch):
    monkeypatch.setattr(meeting, "_GRACE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]))
        with pytest.raises(RankLostError, match="MASTER_PORT may be another program's"):
            Meeting(1, 2, 1.0)


@pytest.fixture
def two_ranks(monkeypatch):
    """Of two, this one; the other holds three times as much everywhere. With the messages' dtypes."""
    messages = []

    def all_reduce(tensor: torch.Tensor) -> None:
        messages.append(tensor.dtype)
        tensor *= 4

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return Cluster(0, 2, 0, 2, torch.device("cpu")), messages


def test_buffers_are_averaged_in_one_message_a_dtype_and_come_back(two_ranks):
    cluster, messages = two_ranks
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    module.register_buffer("sums", torch.rand(2, 3, dtype=torch.float64).t())
    own = [buffer.clone() for buffer in module.buffers()]
    with cluster.averaged_buffers([module]):
        for buffer, before in zip(module.buffers(), own, strict=True):
            assert torch.equal(buffer, before * 2 if before.is_floating_point() else before)
    assert sorted(messages, key=str) == [torch.float32, torch.float64]
    assert all(map(torch.equal, module.buffers(), own))


def test_nccl_meets_at_once_on_this_process_s_gpu(environment, monkeypatch):
    given = {}
    monkeypatch.setattr(dist, "init_process_group", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    environment(LOCAL_RANK="1")
    assert start_cluster("auto").device == torch.device("cuda", 1)
    assert (given["backend"], given["device_id"]) == ("nccl", torch.device("cuda", 1))


def test_torch_waits_longer_than_the_run_itself():
    """Else NCCL would end a process before it is known who is lost: the watch takes 5 s to name somebody."""
    assert collective_timeout(600.0) > timedelta(seconds=610)
