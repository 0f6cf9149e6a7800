"""Against plain reading in this process: `Path.read_bytes`."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from kdav_fast.data.formats import for_dali
from kdav_fast.data.read_ahead import ReaderLostError, read_ahead
from kdav_fast.data.sources.folder import ImageFolder
from kdav_fast.errors import RankLostError

LOCK = type(threading.Lock())
JPEG = b"\xff\xd8\xff"


@pytest.fixture
def folder_of(tmp_path):
    """An ImageFolder of files with these contents."""

    def make(contents: list[bytes]) -> ImageFolder:
        paths = tuple(f"train/{number}.jpg" for number in range(len(contents)))
        (tmp_path / "train").mkdir(exist_ok=True)
        for path, content in zip(paths, contents, strict=True):
            (tmp_path / path).write_bytes(content)
        return ImageFolder(tmp_path, "train", ("a",), np.zeros(len(paths), np.int64), paths)

    return make


@pytest.fixture
def files(folder_of):
    """Forty files of 3 to 5,000 bytes, one of them empty and one of 3 MiB."""
    random = np.random.default_rng(0)
    contents = [JPEG + random.bytes(size) for size in random.integers(0, 5000, 40)]
    contents[7], contents[11] = b"", JPEG + random.bytes(3 * 2**20)
    return folder_of(contents)


def truth(images, batch) -> list[bytes]:
    return [Path(images.root, images.paths[position]).read_bytes() for position in batch]


def as_bytes(contents) -> list[bytes]:
    return [content.tobytes() for content in contents]


def readers() -> list[psutil.Process]:
    """The processes that read for this one and live."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "reading_process" in " ".join(child.cmdline())]


def slabs() -> int:
    """How many pieces of memory this process shares."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return len({link.stat().st_ino for link in links if "kdav_fast-files" in str(link.readlink())})


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within some time; nobody may be there to bury it."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_contents_are_those_of_the_files_in_batches_of_any_size(files):
    random = np.random.default_rng(1)
    batches = [random.integers(0, 40, size) for size in (5, 40, 1, 100, 0, 17)]
    found = [as_bytes(contents) for contents in read_ahead(iter(batches), files, depth=2)]
    assert found == [truth(files, batch) for batch in batches]


@pytest.mark.parametrize("as_source", ["folder", "tar"], indirect=True)
def test_contents_come_from_files_and_from_inside_shards(numbered_split, as_source):
    folder = numbered_split(9)
    images = as_source(folder)
    (contents,) = read_ahead([np.arange(9)], images, depth=1)
    assert sorted(as_bytes(contents)) == sorted(truth(folder, range(9)))


def test_files_that_are_not_in_the_system_s_cache_are_read_as_well(folder_of):
    images = folder_of([JPEG + np.random.default_rng(i).bytes(50_000) for i in range(100)])
    expected = truth(images, range(100))
    for path in images.paths:
        with Path(images.root, path).open("rb+") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (contents,) = read_ahead([np.arange(100)], images, depth=0)
    assert as_bytes(contents) == expected


@pytest.mark.parametrize("suffix", ["gif", "tif", "bmp"])
def test_rare_formats_come_as_dali_decodes_them(tmp_path, suffix):
    (tmp_path / "train").mkdir()
    paths = tuple(f"train/{number}.{suffix}" for number in range(5))
    for number, path in enumerate(paths):
        Image.fromarray(np.full((4 + number, 8, 3), 40 * number, np.uint8)).save(tmp_path / path)
    images = ImageFolder(tmp_path, "train", ("a",), np.zeros(5, np.int64), paths)
    (contents,) = read_ahead([np.arange(5)], images, depth=0)
    expected = [for_dali(np.frombuffer(content, np.uint8)) for content in truth(images, range(5))]
    assert as_bytes(contents) == as_bytes(expected)
    assert (contents[1].tobytes() == truth(images, [1])[0]) == (suffix == "bmp")


def test_it_asks_for_as_much_as_it_was_told(files):
    asked = []

    def batches():
        for number in count():
            asked.append(number)
            yield np.arange(4)

    contents = read_ahead(batches(), files, depth=2)
    for taken in range(1, 4):
        next(contents)
        assert asked == list(range(2 + taken))


def test_an_error_names_its_file_and_appears_with_its_own_batch(files):
    Path(files.root, files.paths[5]).unlink()
    contents = read_ahead((np.arange(start, start + 2) for start in (0, 2, 4, 6)), files, depth=2)
    assert len(list(islice(contents, 2))) == 2
    with pytest.raises(OSError, match="No such file or directory: '.*train/5.jpg'"):
        next(contents)
    assert not readers()


@pytest.mark.parametrize("as_source", ["tar"], indirect=True)
def test_a_shard_that_became_too_short_is_named(numbered_split, as_source):
    images = as_source(numbered_split(9))
    shard = Path(images.root, images.shards[1])
    os.truncate(shard, images.offsets[5] + 3)
    with pytest.raises(OSError, match=rf"the shard is shorter than its index says: '{shard}'"):
        list(read_ahead([np.arange(9)], images, depth=1))


def test_a_batch_stays_as_it_is_while_somebody_refers_to_any_of_it(files):
    order = [np.random.default_rng(i).permutation(40)[:8] for i in range(30)]
    contents = read_ahead(iter(order), files, depth=1)
    kept = [next(contents)[3] for _ in range(5)]
    for _ in contents:
        pass
    assert as_bytes(kept) == [truth(files, batch)[3] for batch in order[:5]]


def test_memory_is_used_again_and_given_back(files):
    contents = read_ahead((np.arange(40) for _ in count()), files, depth=2)
    for _ in range(3):
        deque(islice(contents, 20), maxlen=0)
        assert slabs() <= 4  # three that are asked for, and the one at hand
    kept = next(contents)
    del contents
    gc.collect()
    assert slabs() == 1
    assert as_bytes(kept) == truth(files, range(40))
    del kept
    assert slabs() == 0


def test_a_fork_may_not_go_on_with_it(files):
    contents = endless(files)
    next(contents)
    child = os.fork()
    if child == 0:
        try:
            next(contents)
        except RuntimeError as error:
            os._exit(0 if "build a loader in each process" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    for _ in range(3):
        assert as_bytes(next(contents)) == truth(files, range(4))


def endless(images):
    return read_ahead((np.arange(4) for _ in count()), images, depth=1)


def test_several_read_at_once_and_each_ends_with_its_iterator(files):
    one, other = endless(files), read_ahead((np.arange(4, 9) for _ in count()), files, depth=3)
    for _ in range(3):
        assert as_bytes(next(one)) == truth(files, range(4))
        assert as_bytes(next(other)) == truth(files, range(4, 9))
    assert len(readers()) == 2
    del one
    assert len(readers()) == 1
    assert as_bytes(next(other)) == truth(files, range(4, 9))
    del other
    assert not readers()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_that_stop_a_run_are_left_to_it(files, number):
    contents = endless(files)
    next(contents)
    (reader,) = readers()
    reader.send_signal(number)
    for _ in range(4):
        assert as_bytes(next(contents)) == truth(files, range(4))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 1, "signal 3")])
def test_a_reader_that_was_killed_is_told_in_one_line(files, number, name):
    contents = endless(files)
    next(contents)
    (reader,) = readers()
    reader.send_signal(number)
    with pytest.raises(ReaderLostError, match=rf"process {reader.pid} on host .* {name}") as error:
        list(contents)
    assert isinstance(error.value, RankLostError)  # which the command line prints alone
    assert "\n" not in str(error.value)


SCRIPT = """
import os, signal, sys, time
import numpy as np, psutil
from itertools import count
from pathlib import Path
from kdav_fast.data.read_ahead import read_ahead
from kdav_fast.data.sources.folder import ImageFolder
root, ending = sys.argv[1:]
images = ImageFolder(Path(root), "train", ("a",), np.zeros(40, int), tuple(f"train/{i}.jpg" for i in range(40)))
contents = read_ahead((np.arange(40) for _ in count()), images, 2)
next(contents)
print(*(child.pid for child in psutil.Process().children()), flush=True)
if ending == "fork" and os.fork() == 0:
    time.sleep(30)  # with this process's end of the socket
    os._exit(0)
os.kill(os.getpid(), {"kill": signal.SIGKILL, "fork": signal.SIGKILL, "term": signal.SIGTERM}[ending])
"""


@pytest.mark.parametrize("ending", ["kill", "term", pytest.param("fork", marks=pytest.mark.slow)])
def test_a_reader_does_not_outlive_the_process_it_reads_for(files, ending):
    command = [sys.executable, "-c", SCRIPT, str(files.root), ending]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reader = int(process.stdout.readline())
        assert process.wait(30) == (-signal.SIGTERM if ending == "term" else -signal.SIGKILL)
        assert gone(reader)
        process.stdout.close()


@pytest.mark.parametrize("module", ["threading", "subprocess", "weakref"])
def test_it_can_be_collected_under_any_lock_of_the_library(files, module):
    """Where the collector runs is chance."""
    locks = [lock for lock in vars(importlib.import_module(module)).values() if isinstance(lock, LOCK)]
    contents = [endless(files)]
    next(contents[0])

    def collect():
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            contents.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert not readers()
