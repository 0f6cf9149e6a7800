"""Ctrl-C ends a command at once, in one line, whatever it is doing: each test is a process that does it."""

import signal
import subprocess
import sys
import textwrap

import pytest

from kdav_fast.cli import main

START = """
import atexit, multiprocessing, os, signal, sys, threading, time, hashlib
from pathlib import Path
from kdav_fast.runtime.ending import before_end
from kdav_fast.runtime.interrupts import Interrupts
interrupts = Interrupts()
interrupts.__enter__()
interrupts.expect_stops("REMARK")
def ready(): os.write(1, b"ready\\n")
"""
LINE = "kdav: interrupted; REMARK\n"


def start(program: str, *prefix: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", START + textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests themselves may run under nohup, which every process would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def end(process: subprocess.Popen, number: int = signal.SIGINT) -> tuple[int, str, str]:
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error


@pytest.mark.parametrize(
    "doing",
    [
        "ready(); time.sleep(99)",
        "lock = threading.Lock(); lock.acquire(); ready(); lock.acquire()",
        "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",  # in C, which returns to Python much later
        "threading.Thread(target=time.sleep, args=(99,)).start(); ready()",  # waited for at the end
        "atexit.register(time.sleep, 99); ready()",
        """
        class Slow:
            def __del__(self):
                ready()
                time.sleep(99)
        slow = Slow()
        del slow
        """,
    ],
    ids=["asleep", "waiting", "in a library", "joining threads", "in an exit handler", "in a finaliser"],
)
def test_at_once_and_in_one_line(doing):
    assert end(start(doing)) == (130, "", LINE)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")])
def test_a_signal_that_stops_runs_leaves_a_run_to_be_continued(number, name):
    assert end(start("ready(); time.sleep(99)"), number) == (75, "", f"kdav: stopped by {name}; REMARK\n")


def test_nohup_is_respected():
    process = start("ready(); time.sleep(99)", "nohup")
    process.send_signal(signal.SIGHUP)
    assert end(process)[0] == 130


def test_the_first_signal_belongs_to_who_listens_for_it_and_the_second_ends_at_once():
    process = start(
        """
        def graceful(number, frame): print("asked", flush=True)
        signal.signal(signal.SIGINT, graceful)
        ready()
        while True: time.sleep(0.01)
        """
    )
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    code, _, error = end(process)
    assert (code, error) == (130, LINE)


def test_what_must_be_done_before_is_done_and_a_hanging_deed_is_not_waited_for():
    process = start(
        """
        before_end(lambda: time.sleep(99))
        before_end(lambda: print("let go", flush=True))
        before_end(lambda: print("not this", flush=True))()
        ready()
        time.sleep(99)
        """
    )
    assert end(process) == (130, "let go\n", LINE)


def test_a_child_process_ends_with_its_parent_and_says_nothing():
    process = start(
        """
        def work():
            os.kill(os.getpid(), signal.SIGINT)  # a terminal sends it to all
            print("child goes on", flush=True)
            time.sleep(99)
        child = multiprocessing.get_context("fork").Process(target=work)
        ready()
        child.start()
        time.sleep(99)
        """
    )
    assert process.stdout.readline() == "child goes on\n"
    # Its end of the pipe is closed too: else `communicate` would wait for it.
    assert end(process) == (130, "", LINE)


def test_after_the_command_is_done_only_the_exit_is_cut_short():
    process = start("interrupts.finish(0); atexit.register(time.sleep, 99); ready()")
    assert end(process) == (0, "", "")


def test_a_library_s_caller_keeps_the_handlers():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["doctor", "--loss-shape", "nonsense"]) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_where_another_handler_raises_it_is_one_line_too(monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdav_fast.data.checks.survey.survey", interrupt)
    assert main(["data", "check", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "kdav: interrupted\n"


def test_a_reader_that_is_gone_costs_no_traceback(tmp_path):
    """As `kdav ... | head` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kdav_fast", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)
