"""Which process this is, in words that another host or a later boot can judge."""

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import psutil


class ProcessIdentity(NamedTuple):
    """One process, as it introduces itself to others."""

    token: str
    """Never the same twice."""
    host: str
    process: int
    since: float
    """When it introduced itself, in seconds since 1970 by its own clock: for people."""
    machine: str
    """Processes of an equal one see each other's numbers: the boot and the namespace, where the system tells them."""
    started: str
    """When the process started, as the machine tells it: a number that is used again belongs to a later start."""
    job: str
    """What a scheduler calls the job, the same each time that it starts it; empty without one."""
    attempt: int
    """Which start of the job this is. Of two, the scheduler has ended the earlier one."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """That of the calling process."""
        process = os.getpid()
        job, attempt = _job(environment)
        return cls(
            secrets.token_hex(8),
            socket.gethostname(),
            process,
            time.time(),
            _machine(),
            start_of(process) or "",
            job,
            attempt,
        )

    def as_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Raises `ValueError` for anything else than what `as_json` gives."""
        try:
            fields = json.loads(content)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        kinds = cls.__annotations__
        if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != kinds:
            raise ValueError("not a process's identity")
        identity = cls(**fields)
        try:
            str(identity)
        except (OverflowError, OSError) as error:
            raise ValueError("not a time") from error
        if not re.fullmatch(r"\w{1,64}", identity.token):  # it becomes part of a file's name
            raise ValueError("not a token")
        return identity

    def is_running(self, here: "ProcessIdentity") -> bool | None:
        """Whether the process still runs, as far as `here` can see; None if it cannot.

        Of two containers with one host name, neither sees the other's processes: their namespaces tell them apart.
        """
        if here.job and here.job == self.job and here.attempt > self.attempt:
            return False
        if not self.machine or self.machine != here.machine:
            return None
        try:
            started = start_of(self.process)
        except PermissionError:
            return None
        return started == self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.process} on host {self.host} since {since}"


def start_of(process: int) -> str | None:
    """When a process of this machine started; None if there is none, or only its exit code is left of it.

    Raises:
        PermissionError: there is one, but the system does not show it.
    """
    if not Path("/proc/self/stat").exists():
        try:
            other = psutil.Process(process)
            return None if other.status() == psutil.STATUS_ZOMBIE else str(round(other.create_time()))
        except psutil.NoSuchProcess:
            return None
        except psutil.AccessDenied:
            raise PermissionError(process) from None
    try:
        # Its second field, the name, is in brackets and may hold blanks and brackets.
        state, *fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        raise PermissionError(process) from None  # /proc may be mounted so that it hides others' processes
    return None if state in "ZX" else fields[18]  # ticks since boot: no clock that somebody sets


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return "" if Path("/proc").exists() else socket.gethostname()


def _job(environment: Mapping[str, str]) -> tuple[str, int]:
    """A Slurm job that is requeued keeps its number; torch's elastic launcher counts its restarts."""
    if "SLURM_JOB_ID" in environment:
        cluster = environment.get("SLURM_CLUSTER_NAME", "")
        return f"slurm {cluster} {environment['SLURM_JOB_ID']}", _count(
            environment.get("SLURM_RESTART_COUNT")
        )
    elastic = environment.get("TORCHELASTIC_RUN_ID", "none")
    if elastic != "none":  # that is the name of all that were given none
        return f"torchelastic {elastic}", _count(environment.get("TORCHELASTIC_RESTART_COUNT"))
    return "", 0


def _count(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
