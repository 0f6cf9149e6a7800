"""Lost processes are named: three real processes over gloo, of which one is killed, frozen, fails or leaves.

Each test runs this file as a script, which forks the processes and prints what became of them.
"""

import atexit
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import psutil
import pytest
import torch
import torch.distributed as dist

from kdav_fast.errors import InputError
from kdav_fast.runtime.liveness import Liveness
from kdav_fast.runtime.meeting import Meeting

WORLD = 3
BEAT, PATIENCE = 0.1, 3.0
COLLECTIVES = timedelta(seconds=5)
MEETING = 20.0
SILENCE = 10.0
FOR_EVER = 10000.0
WATCHDOG = 120
"""Seconds until a test that hangs is ended; no test measures time."""
HARMLESS = ("suspend all", "keep the lock")
"""What no rank is lost by."""
UNBROKEN = (*HARMLESS, "kill behind a child")
"""What collectives do not notice."""


def run_rank(fault: str, faulty: int) -> None:
    """What one process does: reduce until something happens."""
    rank = int(os.environ["RANK"])
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())  # run last, as in a run
    meeting = Meeting(rank, WORLD, MEETING)
    silence = {"kill behind a child": FOR_EVER, "suspend all": 4.0}.get(fault, SILENCE)
    liveness = Liveness(rank, WORLD, meeting, silence=silence, beat=BEAT, patience=PATIENCE)
    votes = []
    with liveness.naming_lost_ranks():
        if fault == "never come" and rank == faulty:
            sys.exit()
        store = liveness.meet({"lr": "0.5" if fault == "unlike" and rank == faulty else "0.1"}, MEETING)
        collectives = timedelta(seconds=FOR_EVER) if fault in UNBROKEN else COLLECTIVES
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=collectives)
        patient = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        for step in itertools.count():
            if step == 10 and fault == "kill":
                threading.Thread(target=play_launcher, daemon=True).start()
            if step == 10 and fault == "kill behind a child":
                signal.signal(signal.SIGTERM, lambda *_: None)  # as while a run trains
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            if step == 10 and rank == faulty:
                if fault == "leave":
                    return
                commit(fault)
            if step == 10 and fault == "linger":
                threading.Thread(target=threading.Event().wait).start()
            if step == 20 and fault in HARMLESS:
                return
            if step == 10 and fault == "freeze while others wait" and rank != faulty:
                dist.barrier(group=patient)
            if step == 10 and fault == "fail alike":
                time.sleep(5 * BEAT * rank)  # until the later ones know that the first has failed
                raise RuntimeError(f"shapes differ on rank {rank}")
            # As a run's votes: nobody waits for the last one, which a frozen process never answers.
            votes.append(dist.all_reduce(torch.ones(1), group=patient, async_op=True))
            dist.all_reduce(torch.ones(1))


def commit(fault: str) -> None:
    if fault == "kill behind a child":
        time.sleep(10 * BEAT)  # until rank 0 knows whose its connection is
        if os.fork() == 0:
            os.close(sys.stdout.fileno())  # which its reader would wait for
            time.sleep(WATCHDOG)  # and gloo's connections stay open
            os._exit(0)
    if fault.startswith("kill") or fault == "linger":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "suspend all":
        os.killpg(0, signal.SIGSTOP)
    if fault == "keep the lock":
        ctypes.PyDLL(None).usleep(int(1.5 * PATIENCE * 1e6))
    if fault.startswith("freeze"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "input":
        raise InputError("no such file here")
    if fault == "fail":
        raise ValueError("boom\nin two lines")


def play_launcher() -> None:
    """As DeepSpeed's launcher does: after a process died, SIGTERM soon ends the others."""
    deadline = time.monotonic() + 0.75 * PATIENCE
    while signal.getsignal(signal.SIGTERM) != signal.SIG_IGN and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def main(fault: str, faulty: int) -> None:
    """Fork the ranks; print process, exit code and errors of each when all but a frozen one have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    outputs = [tempfile.TemporaryFile("w+") for _ in range(WORLD)]  # noqa: SIM115
    processes = []
    for rank, output in enumerate(outputs):
        processes.append(os.fork())
        if processes[-1] == 0:
            os.dup2(output.fileno(), sys.stderr.fileno())
            os.environ["RANK"] = str(rank)
            run_rank(fault, faulty)
            sys.exit()
    codes = {}
    for rank in sorted(range(WORLD), key=faulty.__eq__):  # the faulty one last
        if rank == faulty and fault.startswith("freeze"):
            os.kill(processes[rank], signal.SIGKILL)
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(processes[rank], 0)[1])
    for output in outputs:
        output.seek(0)
    print(json.dumps([(processes[r], codes[r], outputs[r].read()) for r in range(WORLD)]))


class End(NamedTuple):
    """What became of a process."""

    name: str
    code: int
    error: str
    """The last line on stderr: without a traceback, hence the exception."""


def ends(fault: str, faulty: int) -> list[End]:
    command = [sys.executable, __file__, fault, str(faulty)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        if fault == "suspend all":
            resume_later(script.pid)
        results = json.loads(script.communicate(timeout=WATCHDOG)[0])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)  # the forked ranks too
    return [
        End(
            f"rank {rank} (host {socket.gethostname()}, process {process})",
            code,
            # torch prefixes a traceback's lines.
            errors.splitlines()[-1].removeprefix(f"[rank{rank}]: ") if errors else "",
        )
        for rank, (process, code, errors) in enumerate(results)
    ]


def resume_later(script: int) -> None:
    """As after Ctrl-Z, or of a laptop that was closed: all processes stand still for longer than the silence."""
    while psutil.Process(script).status() != psutil.STATUS_STOPPED:
        time.sleep(0.1)
    time.sleep(6.0)
    os.killpg(script, signal.SIGCONT)


def check_others_say(ranks: list[End], faulty: int, what: str) -> None:
    for survivor in {*range(WORLD)} - {faulty}:
        assert ranks[survivor].error == (
            f"kdav_fast.errors.RankLostError: {ranks[faulty].name} {what}; look into its output, then start "
            "the same command again: it continues from the last checkpoint"
        )
        assert ranks[survivor].code == 1


ANY_RANK = pytest.mark.parametrize("faulty", [1, 0], ids=["rank 1", "rank 0 with the store"])


@pytest.mark.parametrize("faulty", [1, pytest.param(0, marks=pytest.mark.slow, id="rank 0 with the store")])
def test_a_killed_rank_is_named_although_the_launcher_ends_the_others(faulty):
    ranks = ends("kill", faulty)
    assert ranks[faulty].code == -signal.SIGKILL
    check_others_say(ranks, faulty, "no longer answers")


@pytest.mark.slow
@ANY_RANK
def test_a_frozen_rank_is_named(faulty):
    check_others_say(ends("freeze", faulty), faulty, "no longer answers")


@pytest.mark.slow
@ANY_RANK
def test_a_rank_that_fails_does_so_with_its_own_error_which_the_others_tell(faulty):
    ranks = ends("fail", faulty)
    assert ranks[faulty].code == 1
    assert ranks[faulty].error == "in two lines"
    check_others_say(ranks, faulty, "ended with ValueError: boom in two lines")


@pytest.mark.slow
def test_an_error_that_all_ranks_have_stays_what_it_is():
    for rank, end in enumerate(ends("fail alike", -1)):
        assert end.error == f"RuntimeError: shapes differ on rank {rank}"


@pytest.mark.slow
def test_a_rank_that_left_in_order_is_not_lost():
    ranks = ends("leave", 1)
    assert ranks[1].code == 0
    for survivor in (0, 2):
        assert ranks[survivor].code == 1
        assert re.match(r"RuntimeError: .*gloo", ranks[survivor].error), ranks[survivor].error


@pytest.mark.slow
@ANY_RANK
def test_a_rank_frozen_while_the_others_wait_long_for_it_is_named_in_time(faulty):
    """Their collective has half an hour."""
    ranks = ends("freeze while others wait", faulty)
    for survivor in {*range(WORLD)} - {faulty}:
        # From the thread that watches, or, where the other survivor has ended before, from the broken collective.
        assert f"{ranks[faulty].name} no longer answers; look into its output" in ranks[survivor].error
        assert ranks[survivor].code == 1


@pytest.mark.parametrize("faulty", [1, pytest.param(0, marks=pytest.mark.slow, id="rank 0 with the store")])
def test_a_killed_rank_is_named_where_collectives_block_for_ever(faulty):
    """As NCCL's do: gloo's connections to it stay open, and its launcher's SIGTERM meets a run's handler."""
    ranks = ends("kill behind a child", faulty)
    for survivor in {*range(WORLD)} - {faulty}:
        line = f"kdav: error: {ranks[faulty].name} no longer answers; look into its output, then start"
        assert ranks[survivor].error.startswith(line)
        assert ranks[survivor].code == 1


@pytest.mark.slow
def test_a_rank_ends_although_another_thread_of_its_own_does_not():
    check_others_say(ends("linger", 1), 1, "no longer answers")


@pytest.mark.slow
@pytest.mark.parametrize("fault", HARMLESS)
def test_a_rank_that_stood_still_is_not_lost(fault):
    assert [end.code for end in ends(fault, 1)] == [0] * WORLD


@pytest.mark.parametrize("faulty", [1, pytest.param(0, marks=pytest.mark.slow, id="rank 0 with the store")])
def test_bad_input_of_one_rank_is_that_of_all(faulty):
    ranks = ends("input", faulty)
    for survivor in {*range(WORLD)} - {faulty}:
        assert (
            ranks[survivor].error == f"kdav_fast.errors.InputError: {ranks[faulty].name}: no such file here"
        )
        assert ranks[survivor].code == 2


@pytest.mark.slow
def test_unlike_facts_are_named_with_each_rank_s_value():
    ranks = ends("unlike", 1)
    for end in ranks:
        assert f"lr is 0.1 on {ranks[0].name} and 0.5 on {ranks[1].name}" in end.error


def test_a_single_process_has_no_thread_and_no_store():
    threads = threading.active_count()
    liveness = Liveness(0, 1)  # with neither address nor process group
    assert threading.active_count() == threads
    assert liveness.lost() == ""
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError) as caught, liveness.naming_lost_ranks():
        raise error
    assert caught.value is error
    liveness.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
