"""One run a folder: who is refused, who may take over, and who notices that it was succeeded."""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kdav_fast.errors import InputError
from kdav_fast.runtime import run_lock
from kdav_fast.runtime.process_identity import ProcessIdentity, start_of
from kdav_fast.runtime.run_lock import FILE_NAME, PATIENCE, RunLock

HERE = ProcessIdentity.here({})
ELSEWHERE = HERE._replace(host="other", machine="another boot")


def identity(like: ProcessIdentity = HERE, **changes) -> ProcessIdentity:
    return like._replace(**{"token": ProcessIdentity.here({}).token, **changes})


def grow_old(folder: Path, seconds: float) -> None:
    """As if the holder had given its last sign of life so long ago."""
    then = time.time() - seconds
    os.utime(folder / FILE_NAME, (then, then))


def ended_process() -> tuple[int, str]:
    """Number and start of a process that has been."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_of(process.pid)
    process.communicate(b"\n")
    return process.pid, started


def refused(folder: Path, me: ProcessIdentity | None = None) -> str:
    with pytest.raises(InputError) as caught:
        RunLock(folder, me).acquire()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_is_told_who_has_the_folder(tmp_path):
    folder = tmp_path / "deep" / "run"
    with RunLock(folder):
        line = refused(folder)
        assert f"{folder} is in use by process {os.getpid()} on host {HERE.host} since 20" in line
        assert names(folder) == [FILE_NAME]
    with RunLock(folder):  # let go, hence free
        (folder / "metrics.jsonl").touch()
    assert names(folder) == ["metrics.jsonl"]


def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path):
    with RunLock(tmp_path / "deep" / "run"):
        pass
    assert names(tmp_path) == []


def test_an_ended_process_of_this_machine_is_succeeded_at_once(tmp_path):
    process, started = ended_process()
    RunLock(tmp_path, identity(process=process, started=started)).acquire()
    with RunLock(tmp_path):
        assert names(tmp_path) == [FILE_NAME]


def test_a_zombie_has_ended(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_of(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    RunLock(tmp_path, identity(process=process.pid, started=started)).acquire()
    with RunLock(tmp_path):
        pass
    process.wait()


def test_a_process_number_used_again_is_another_process(tmp_path):
    RunLock(tmp_path, identity(started="1")).acquire()
    with RunLock(tmp_path):
        pass


def test_a_number_in_another_namespace_says_nothing(tmp_path):
    """Two containers on one host with one name: the process is not to be seen from here, though it may live."""
    process, started = ended_process()
    RunLock(tmp_path, identity(process=process, started=started, machine="boot pid:[1]")).acquire()
    assert f"process {process}" in refused(tmp_path)


@pytest.mark.parametrize("holder", [HERE, ELSEWHERE], ids=["frozen here", "on another host"])
def test_a_silent_holder_is_succeeded_and_notices_it(tmp_path, holder):
    lock = RunLock(tmp_path, identity(holder))
    lock.acquire()
    grow_old(tmp_path, PATIENCE / 2)
    assert f"last sign of life {PATIENCE / 2:.0f} s ago" in refused(tmp_path)
    lock.check()
    grow_old(tmp_path, PATIENCE + 5)
    with RunLock(tmp_path) as successor:
        with pytest.raises(InputError, match=rf"taken over by process {os.getpid()} .*writes nothing more"):
            lock.check()
        renewed = (tmp_path / FILE_NAME).stat().st_mtime_ns
        lock.renew()
        lock.release()
        successor.check()
        assert (tmp_path / FILE_NAME).stat().st_mtime_ns == renewed


def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    with RunLock(tmp_path, identity(ELSEWHERE)):
        grow_old(tmp_path, PATIENCE + 5)
        while time.time() - (tmp_path / FILE_NAME).stat().st_mtime > 1:
            time.sleep(0.01)
        refused(tmp_path)


def test_age_is_measured_by_the_file_system_s_clock(tmp_path, monkeypatch):
    """Hosts' clocks are hours apart, and the lock is fresh."""
    RunLock(tmp_path, identity(ELSEWHERE)).acquire()
    monkeypatch.setattr(time, "time", lambda: 5e9)
    refused(tmp_path)


def test_a_time_in_the_future_is_no_sign_of_life(tmp_path):
    RunLock(tmp_path, identity(ELSEWHERE)).acquire()
    grow_old(tmp_path, -3600)
    with RunLock(tmp_path):
        pass


SLURM = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_RESTART_COUNT": "0"}


def started_by(environment: dict[str, str]) -> ProcessIdentity:
    return ProcessIdentity.here(environment)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (SLURM, {**SLURM, "SLURM_RESTART_COUNT": "1"}),
        ({**SLURM, "SLURM_RESTART_COUNT": "1"}, {**SLURM, "SLURM_RESTART_COUNT": "2"}),
        (ELASTIC, {**ELASTIC, "TORCHELASTIC_RESTART_COUNT": "1"}),
    ],
)
def test_a_requeued_job_takes_over_from_its_earlier_self_at_once(tmp_path, before, now):
    RunLock(tmp_path, started_by(before)._replace(host="other", machine="another boot")).acquire()
    with RunLock(tmp_path, started_by(now)):
        pass


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (SLURM, SLURM),  # two steps of one job
        (SLURM, {**SLURM, "SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}),
        (SLURM, {**SLURM, "SLURM_CLUSTER_NAME": "d", "SLURM_RESTART_COUNT": "1"}),
        ({**SLURM, "SLURM_RESTART_COUNT": "1"}, SLURM),
        (
            {"TORCHELASTIC_RUN_ID": "none"},
            {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"},
        ),
        ({}, {**SLURM, "SLURM_RESTART_COUNT": "1"}),
    ],
)
def test_another_job_does_not(tmp_path, before, now):
    RunLock(tmp_path, started_by(before)._replace(host="other", machine="another boot")).acquire()
    refused(tmp_path, started_by(now))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        b"{}",
        b"[1]",
        b"{" * 9999,
        b"[" * 100_000,
        identity(token="../../escaped").as_json().encode(),
        identity(since=1e300).as_json().encode(),
        identity().as_json().replace(f'"process": {os.getpid()}', '"process": "7"').encode(),
    ],
)
def test_a_damaged_lock_is_respected_while_it_is_young(tmp_path, content):
    lock = tmp_path / FILE_NAME
    lock.write_bytes(content)
    assert "names nobody" in refused(tmp_path)
    grow_old(tmp_path, PATIENCE + 5)
    with RunLock(tmp_path):
        assert names(tmp_path) == [FILE_NAME]
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "pipe"])
def test_what_is_no_lock_file_is_refused_and_left_alone(tmp_path, kind):
    lock, other = tmp_path / FILE_NAME, tmp_path / "other"
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(other)
        if kind == "link":
            other.write_text("mine")
    before = names(tmp_path)
    assert f"{lock}" in refused(tmp_path)
    assert names(tmp_path) == before


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be locked" in refused(tmp_path / "file")
    assert "cannot be locked" in refused(tmp_path / "file" / "below")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    line = refused(tmp_path / "new")
    assert os.strerror(number) in line
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    with RunLock(tmp_path):
        assert f"process {os.getpid()}" in refused(tmp_path)
    RunLock(tmp_path, identity(started="1")).acquire()
    with RunLock(tmp_path) as lock:
        lock.check()
    assert names(tmp_path) == []


def test_a_lock_file_that_was_removed_is_made_again(tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / FILE_NAME).unlink()
        lock.check()
        refused(tmp_path)


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    folder = tmp_path / "run"
    with RunLock(folder) as lock:
        folder.rename(tmp_path / "moved")
        with pytest.raises(InputError, match="was removed"):
            lock.check()
    assert names(tmp_path) == ["moved"]


def test_a_forked_child_does_not_let_go(tmp_path):
    with RunLock(tmp_path) as lock:
        child = multiprocessing.get_context("fork").Process(target=lock.release)
        child.start()
        child.join()
        lock.check()


def test_who_died_while_succeeding_is_succeeded_too(tmp_path):
    RunLock(tmp_path, identity(started="1")).acquire()
    dead = ProcessIdentity.from_json((tmp_path / FILE_NAME).read_bytes())
    (tmp_path / f"{FILE_NAME}.{dead.token}").write_text(identity(started="2").as_json())
    with RunLock(tmp_path) as lock:
        lock.check()
        assert names(tmp_path) == [FILE_NAME]


def test_old_leftovers_are_swept_up(tmp_path):
    leftover = tmp_path / f"{FILE_NAME}.0123.new"
    leftover.touch()
    os.utime(leftover, (0, 0))
    with RunLock(tmp_path):
        assert names(tmp_path) == [FILE_NAME]


@pytest.mark.parametrize("held_before", [False, True])
def test_of_many_that_try_at_once_exactly_one_has_it(tmp_path, held_before):
    tries, attempts = 30, 8
    for number in range(tries):
        folder = tmp_path / str(number)
        if held_before:
            RunLock(folder, identity(started="1")).acquire()
        start, outcomes = threading.Barrier(attempts), []

        def take(folder=folder, start=start, outcomes=outcomes):
            lock = RunLock(folder, identity())
            start.wait()
            try:
                lock.acquire()
                outcomes.append(lock)
            except InputError as error:
                assert f"process {os.getpid()}" in str(error)  # noqa: PT017

        threads = [threading.Thread(target=take) for _ in range(attempts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 1
        outcomes[0].check()
        assert names(folder) == [FILE_NAME]
        outcomes[0].release()
