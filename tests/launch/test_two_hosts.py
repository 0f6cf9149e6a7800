"""The launches of launch/README.md on two hosts: DeepSpeed's launcher over pdsh and ssh, gloo across a network link."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kdav_fast.config import Config, dump_config
from kdav_fast.data import build_loaders, open_images
from kdav_fast.distillers.memories.ring import TeacherMemory
from kdav_fast.models import IMAGENET
from kdav_fast.student.file import FILE_NAME, read_student
from kdav_fast.tracking.metrics_log import read_metrics
from tests.launch.hosts import Host, two_hosts, why_not

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "launch"
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
CPU_SETTINGS = "OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n"
RANK = "[d]istill.py --local_rank"
"""Matches a rank's command line and no other: the launcher's has no such option there, the shell's a bracket."""

pytestmark = pytest.mark.slow


class Cluster:
    """Two hosts, and the files that a launch needs, made from the examples in launch/."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment_file = folder / "environment"
        # The last line of a name wins.
        self.environment_file.write_text((EXAMPLES / "environment.example").read_text() + CPU_SETTINGS)

    def start(self, config: Config, *words: str, host: int = 0, slots: int = 2) -> subprocess.Popen:
        """`deepspeed --hostfile FILE [words] launch/distill.py CONFIG` on one of the hosts."""
        hostfile = self.folder / f"hostfile{slots}"
        hostfile.write_text((EXAMPLES / "hostfile.example").read_text().replace("slots=8", f"slots={slots}"))
        file = self.folder / f"{config.run_dir.name}.yaml"
        file.write_text(dump_config(config))
        command = [DEEPSPEED, "--hostfile", hostfile, *words, "launch/distill.py", file]
        environment = {
            "PATH": f"{DEEPSPEED.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(Path.home()),
        }
        if "--no_ssh" in words:  # nobody exports anything: a login shell has it all
            environment |= dict(line.split("=") for line in self.environment_file.read_text().split())
        else:
            environment |= {"DS_ACCELERATOR": "cpu", "DS_ENV_FILE": str(self.environment_file)}
        return self.hosts[host].start([str(word) for word in command], REPOSITORY, environment)

    def on(self, host: int, *command: str) -> int:
        """Run a command on a host; returns its exit code."""
        environment = {"PATH": "/usr/bin:/bin"}
        return self.hosts[host].start(command, REPOSITORY, environment, stdout=subprocess.DEVNULL).wait(60)


def finish(*launches: subprocess.Popen) -> list[int]:
    return [launch.wait(timeout=300) for launch in launches]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.2)


def wait_for_a_step(config: Config, launch: subprocess.Popen) -> None:
    file = config.run_dir / "metrics.jsonl"
    wait_until(lambda: launch.poll() is not None or (file.exists() and file.stat().st_size > 0))
    assert launch.poll() is None, f"the launch ended with {launch.returncode} before its first step"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with two_hosts(["node-1", "node-2"], folder / "ssh") as hosts:
        yield Cluster(hosts, folder)


@pytest.fixture(scope="module")
def run_config(small_config, teacher_run, tmp_path_factory):
    """Builds the config of a short distillation: `run_config(name, **changes of train)`."""
    folder = tmp_path_factory.mktemp("runs")

    def build(name: str, **train) -> Config:
        return small_config(
            folder / name,
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            distiller={"name": "kdav", "memory_length": 200},
            data={"train_subset": 90},
            train={"epochs": 1, "log_every": 1, "seed": 7, **train},
        )

    return build


@pytest.fixture(scope="module")
def pdsh_run(cluster, run_config):
    """A run of four processes, two on each host, and the bytes that came to each host meanwhile."""
    config = run_config("pdsh")
    before = [host.bytes_received() for host in cluster.hosts]
    assert finish(cluster.start(config)) == [0]
    return config, [host.bytes_received() - start for host, start in zip(cluster.hosts, before, strict=True)]


def last_checkpoint(config: Config) -> Path:
    return sorted((config.run_dir / "checkpoints").iterdir())[-1]


def final_memory(config: Config) -> TeacherMemory:
    state = load_file(last_checkpoint(config) / "distiller.safetensors")
    memory = TeacherMemory(config.distiller.memory_length, width=64, classes=10)
    memory.load_state_dict({name.removeprefix("memory."): tensor for name, tensor in state.items()})
    return memory


def test_the_memory_holds_the_rows_of_both_hosts_ranks_in_rank_order(pdsh_run, teacher_run):
    config, _ = pdsh_run
    teacher, _ = read_student(teacher_run)
    center = load_file(last_checkpoint(config) / "buffers-00000.safetensors")["student.head.center"]
    shares = [
        build_loaders(
            config.data,
            open_images(config.data, config.train.seed),
            batch_size=config.train.batch_size // 4,
            eval_batch_size=64,
            device=torch.device("cpu"),
            rank=rank,
            world=4,
            local_world=2,
            seed=config.train.seed,
            normalization=IMAGENET,
        ).train
        for rank in range(4)
    ]
    expected = []
    with torch.no_grad():
        for batches in zip(*shares, strict=True):
            for batch in batches:
                features = teacher(batch.images).features[batch.valid] - center
                expected.append(F.normalize(features, dim=1))
    expected = torch.cat(expected)
    memory = final_memory(config)
    assert memory.filled == len(expected) == 90  # one epoch, padding left out
    torch.testing.assert_close(memory.embedding[:90], expected, rtol=1e-4, atol=1e-4)


def test_each_step_s_gradient_crosses_the_link(pdsh_run):
    config, received = pdsh_run
    pieces = [load_file(file) for file in last_checkpoint(config).glob("pieces-*.safetensors")]
    weights = {name: tensor for each in pieces for name, tensor in each.items() if name.startswith("weight:")}
    gradient = 4 * sum(tensor.numel() for tensor in weights.values())  # bytes, float32
    steps = len([line for line in read_metrics(config.run_dir) if "train/loss" in line])
    assert steps == 3
    assert min(received) > steps * gradient


def test_without_ssh_the_result_is_the_same(cluster, run_config, pdsh_run):
    config = run_config("no_ssh")
    no_ssh = ["--no_ssh", "--master_addr", cluster.hosts[0].address]
    launches = [cluster.start(config, *no_ssh, "--node_rank", str(host), host=host) for host in range(2)]
    assert finish(*launches) == [0, 0]
    with_ssh = pdsh_run[0]
    assert (config.run_dir / FILE_NAME).read_bytes() == (with_ssh.run_dir / FILE_NAME).read_bytes()
    ours, theirs = (final_memory(each).state_dict() for each in (config, with_ssh))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_stopped_from_another_host_and_continued(cluster, run_config):
    config = run_config("stopped", epochs=150, evaluate_every=0, save_every=0)
    launch = cluster.start(config, slots=1)
    wait_for_a_step(config, launch)
    assert cluster.on(0, "ssh", "node-2", f"pkill -USR1 -f '{RANK}'") == 0
    assert finish(launch) == [75]
    assert not (config.run_dir / FILE_NAME).exists()
    assert finish(cluster.start(config, slots=1)) == [0]
    steps = [line["step"] for line in read_metrics(config.run_dir) if "train/loss" in line]
    assert steps == list(range(1, 451))


def test_the_launcher_ended_the_state_saved(cluster, run_config):
    """SIGTERM to `deepspeed` itself: its exit code is 1, but every rank is told to stop."""
    config = run_config("ended", epochs=1000, evaluate_every=0, save_every=0)
    logs = cluster.folder / "logs"
    launch = cluster.start(config, "--enable_each_rank_log", str(logs), slots=1)
    wait_for_a_step(config, launch)
    assert cluster.on(0, "pkill", "-TERM", "-f", "bin/[d]eepspeed --hostfile") == 0
    assert finish(launch) == [1]
    wait_until(lambda: all(cluster.on(host, "pgrep", "-f", RANK) == 1 for host in range(2)))
    assert "state saved" in "".join(file.read_text() for file in logs.iterdir())


def test_bad_input_is_exit_code_2_and_one_line(cluster, run_config, capfd):
    config = run_config("bad", batch_size=33)
    assert finish(cluster.start(config, slots=1)) == [2]
    output = capfd.readouterr()
    errors = [line for line in (output.out + output.err).splitlines() if "kdav: error" in line]
    assert len(errors) == 1
    assert "train.batch_size is 33" in errors[0]
