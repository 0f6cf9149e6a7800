"""The example files and commands of launch/ mean to DeepSpeed, bash and kdav what they say."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_args

from kdav_fast.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted((LAUNCH / "slurm").glob("*.sbatch"))
GUIDE = LAUNCH / "README.md"


def test_the_hostfile_is_one_for_deepspeed():
    assert fetch_hostfile(LAUNCH / "hostfile.example") == {"node-1": 8, "node-2": 8}


def test_every_line_of_the_environment_is_a_variable():
    """DeepSpeed knows no comments and no empty lines there: a `#` would hide the rest of the remote command."""
    lines = (LAUNCH / "environment.example").read_text().splitlines()
    assert lines
    assert all(re.fullmatch(r"[A-Z_]+=\S+", line) for line in lines)
    assert len({line.split("=")[0] for line in lines}) == len(lines)


def test_there_is_a_slurm_script():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("file", [*SCRIPTS, GUIDE], ids=lambda path: path.name)
def test_every_recipe_and_key_it_names_exists(file):
    commands = re.findall(r"(launch/\w+\.yaml)((?: [\w.]+=\S+)*)", file.read_text())
    assert commands
    for recipe, overrides in commands:
        load_config(REPOSITORY / recipe, overrides.split())


def test_every_deepspeed_command_of_the_guide_has_options_that_exist():
    blocks = "".join(re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith("deepspeed ")]
    assert len(commands) == 4
    for command in commands:
        options = parse_args(shlex.split(command, comments=True)[1:])
        assert options.user_script == "launch/distill.py"
        assert (REPOSITORY / options.user_args[0]).is_file()
