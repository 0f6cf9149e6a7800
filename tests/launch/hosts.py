"""Hosts that exist only while a test runs: namespaces of this machine, each with its address and its own sshd.

A host is the process tree below one `unshare`: its own network, process numbers, mounts and host name. The
hosts share this machine's files, as the hosts of a cluster share theirs. The first process of a host ends when
the pipe from the test closes, however the test ends, and the kernel then removes all the rest. Outside, nothing
is made: no interface, no address, no file but in the folder given.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "pdsh": "pdsh",
    "pkill": "procps",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}
"""What is needed, and the Debian package that has it."""

INTERFACE = "eth0"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ["--net", "--pid", "--mount", "--uts", "--ipc"]
_NEW_HOST = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]

# Debian writes 127.0.1.1 beside a host's own name, and so does this: gloo must be told its interface.
_FIRST_PROCESS = """
set -e
cd "$1"
hostname "$2"
{ echo "127.0.0.1 localhost"; echo "127.0.1.1 $2"; grep -vw "$2" addresses; } > "hosts.$2"
mount --bind "hosts.$2" /etc/hosts
mount --bind ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
ip link set lo up
"$(command -v sshd)" -f sshd_config -E "sshd.$2.log"
echo ready
exec cat
"""


def why_not() -> str | None:
    """What this machine lacks for such hosts; None if nothing."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    missing = {
        program: package for program, package in PROGRAMS.items() if not shutil.which(program, path=_PATH)
    }
    if missing:
        return f"needs {', '.join(missing)}: apt-get install {' '.join(sorted(set(missing.values())))}"
    probe = subprocess.run(
        [*_NEW_HOST, "ip", "link", "add", "type", "veth"],
        env={"PATH": _PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"this machine makes no namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass(frozen=True)
class Host:
    """A running host."""

    name: str
    address: str
    pid: int
    """Its first process, as numbered outside."""

    def start(self, command: Sequence[str], cwd: Path, env: dict[str, str], **options) -> subprocess.Popen:
        """Start a command there, as somebody logged in with this environment."""
        enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES, f"--wd={cwd}"]
        return subprocess.Popen([*enter, *command], env=env, text=True, **options)

    def bytes_received(self) -> int:
        """What came in over its interface so far, from the kernel."""
        devices = Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()
        counts = next(line for line in devices if line.strip().startswith(f"{INTERFACE}:"))
        return int(counts.split(":")[1].split()[0])


@contextmanager
def two_hosts(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Two hosts joined by one link, where root of one may log in to both.

    Args:
        names: their host names.
        folder: where keys, settings and logs are written.
    """
    addresses = ["192.0.2.1", "192.0.2.2"]  # reserved for documentation (RFC 5737): nobody's
    folder.mkdir()
    _write_ssh_settings(folder, names)
    (folder / "addresses").write_text("".join(f"{a} {n}\n" for a, n in zip(addresses, names, strict=True)))
    with ExitStack() as stack:
        pids = [_boot(stack, folder, name) for name in names]
        # Made inside the first host's network with its other end in the second's: never in this machine's.
        link = ["link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(pids[1])]
        _ip(pids[0], *link)
        for pid, address in zip(pids, addresses, strict=True):
            _ip(pid, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip(pid, "link", "set", INTERFACE, "up")
        yield [Host(*each) for each in zip(names, addresses, pids, strict=True)]


def _write_ssh_settings(folder: Path, names: Sequence[str]) -> None:
    for key in ("host_key", "user_key"):
        generate = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(generate, check=True)
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {host_key}" for name in names))
    (folder / "ssh_config").write_text(
        f"Host *\nBatchMode yes\nIdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\n"
    )
    # StrictModes would refuse a key file below a folder that all may write to, such as /tmp.
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )


def _boot(stack: ExitStack, folder: Path, name: str) -> int:
    host = stack.enter_context(
        subprocess.Popen(
            [*_NEW_HOST, "sh", "-c", _FIRST_PROCESS, "sh", str(folder), name],
            env={"PATH": _PATH, "HOME": str(Path.home())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    if host.stdout.readline() != "ready\n":
        raise RuntimeError(f"host {name} did not start; its messages are above")
    (first_process,) = psutil.Process(host.pid).children()
    return first_process.pid


def _ip(pid: int, *arguments: str) -> None:
    command = ["nsenter", f"--target={pid}", "--net", "ip", *arguments]
    subprocess.run(command, env={"PATH": _PATH}, check=True)
