"""What a launcher sets, wrongly set: one line from whichever process, and no wait without end."""

import socket

import pytest

from kdav_fast.cli import main
from kdav_fast.errors import InputError, RankLostError
from kdav_fast.runtime import meeting
from kdav_fast.runtime.meeting import Meeting
from kdav_fast.runtime.processes import start_cluster


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
