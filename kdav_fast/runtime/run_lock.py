"""A run's folder is one run's at a time, on a shared file system too.

The lock is a file that names its holder, made in one go by a hard link (where there are none, by exclusive creation).
The holder renews its time while it lives. Whether a holder is gone, the machine tells where it can (its process has
ended; its job was requeued), else the age of that time, by the file system's clock: hosts' clocks need not agree.

To succeed a holder that is gone, a process must first hold the lock on that succession, a file of the same kind named
after the holder, and find the old one still in place: of several that try, one succeeds.
"""

import errno
import hashlib
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from kdav_fast.errors import InputError, lack_of_means
from kdav_fast.runtime.ending import before_end
from kdav_fast.runtime.files import write_flushed
from kdav_fast.runtime.process_identity import ProcessIdentity

FILE_NAME = "run.lock"
BEAT = 10.0
"""Seconds between two signs of life."""
PATIENCE = 60.0
"""Seconds without one after which a holder counts as gone."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class _Entry(NamedTuple):
    """What a lock file says."""

    token: str
    holder: ProcessIdentity | None
    """None if nobody can read it: it is empty or damaged."""
    renewed: float
    """The file's time."""


class RunLock:
    """Holds a run's folder, as a context manager or from `acquire` to `release`.

    Args:
        folder: made if needed, and removed again if nothing was written to it.
        me: who takes it.

    Raises:
        InputError: in `acquire` and `check`: somebody else has the folder, or it cannot be locked.
    """

    def __init__(self, folder: Path, me: ProcessIdentity | None = None) -> None:
        self._folder, self._path = folder, folder / FILE_NAME
        self._me = me or ProcessIdentity.here()
        self._made: list[Path] = []
        self._held = False
        self._released = threading.Event()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the folder, before anything in it is touched."""
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            self._remove_made()
            raise InputError(
                f"run_dir {self._folder} cannot be locked: {error.strerror}; give a folder that can be written"
            ) from None
        self._held = True
        self._forget_end = before_end(self.release)
        self._remove_leftovers()
        threading.Thread(target=self._keep_renewing, name="run-lock", daemon=True).start()

    def check(self) -> None:
        """Make sure that the folder is still ours: call this before writing to it.

        A process that was frozen may have been succeeded meanwhile. A lock file that somebody removed is made again.
        """
        entry = self._read(self._path)
        if entry is None:
            try:
                self._take()
                return
            except OSError as error:
                raise InputError(
                    f"run_dir {self._folder} was removed or cannot be written any more ({error.strerror}); what this "
                    "run held in memory is lost: start it again"
                ) from None
        if entry.token != self._me.token:
            raise InputError(
                f"run_dir {self._folder} was taken over by {entry.holder or 'another process'} while this process did "
                "not answer; it writes nothing more"
            )

    def release(self) -> None:
        """Let go, if it is ours; never fails. A forked child lets nothing go."""
        if not self._held or self._me.process != os.getpid():
            return
        self._held = False
        self._forget_end()
        self._released.set()
        with suppress(OSError, InputError):
            entry = self._read(self._path)
            if entry is not None and entry.token == self._me.token:
                self._path.unlink()
        self._remove_made()

    def _take(self) -> None:
        draft = self._beside(f"{self._me.token}.new")
        try:
            write_flushed(draft, self._me.as_json())
            self._link(draft, self._path)
        finally:
            with suppress(OSError):
                draft.unlink()

    def _link(self, draft: Path, path: Path) -> None:
        """Give the draft a name that nobody living holds."""
        while not _named(draft, path):
            entry = self._read(path)
            if entry is None:
                continue  # let go just now
            self._refuse_if_alive(entry, draft)
            succession = self._beside(entry.token)
            self._link(draft, succession)
            there = self._read(path)
            if there is not None and there.token == entry.token:
                succession.replace(path)
                return
            succession.unlink(missing_ok=True)

    def _refuse_if_alive(self, entry: _Entry, draft: Path) -> None:
        os.utime(draft)
        age = draft.stat().st_mtime - entry.renewed
        # A time far ahead is no sign of life either: who lives renews it by the file system's clock.
        silent = abs(age) > PATIENCE
        if entry.holder is None:
            if not silent:
                raise InputError(
                    f"run_dir {self._folder}: the lock file {self._path.name} names nobody and is {max(age, 0):.0f} s "
                    f"old; try again in {PATIENCE:.0f} s"
                )
            return
        running = entry.holder.is_running(self._me)
        if running is False or silent:
            return
        remedy = "wait for its end, stop it, or give another run_dir"
        if running is None:
            remedy += f" (if it is gone, the folder is free {PATIENCE:.0f} s after its last sign of life)"
        raise InputError(
            f"run_dir {self._folder} is in use by {entry.holder}, which gave its last sign of life {max(age, 0):.0f} s "
            f"ago; {remedy}"
        )

    def _read(self, path: Path) -> _Entry | None:
        """None if there is no such file."""
        try:
            # Opening makes a network file system ask its server; a pipe must not be waited for.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if lack := lack_of_means(error):
                raise lack from None
            reason = "is a link" if error.errno == errno.ELOOP else error.strerror
            raise InputError(f"{path}: {reason}; remove it if no run uses the folder") from None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path} is no file; remove it")
            content = os.read(handle, 1 << 16)
        except FileNotFoundError:
            return None
        finally:
            os.close(handle)
        try:
            holder = ProcessIdentity.from_json(content)
            return _Entry(holder.token, holder, status.st_mtime)
        except ValueError:
            seal = hashlib.sha256(content + f"{status.st_ino} {status.st_mtime_ns}".encode()).hexdigest()
            return _Entry(seal[:16], None, status.st_mtime)

    def _keep_renewing(self) -> None:
        while not self._released.wait(BEAT):
            self.renew()

    def renew(self) -> None:
        """Give a sign of life; happens by itself."""
        with suppress(OSError, InputError):  # whoever writes next will tell
            entry = self._read(self._path)
            if entry is not None and entry.token == self._me.token:
                os.utime(self._path)

    def _beside(self, name: str) -> Path:
        return self._path.with_name(f"{FILE_NAME}.{name}")

    def _remove_leftovers(self) -> None:
        """Of those who died while they took the lock."""
        with suppress(OSError):
            now = self._path.stat().st_mtime
            for path in self._folder.glob(f"{FILE_NAME}.*"):
                with suppress(OSError):
                    if now - path.stat().st_mtime > PATIENCE:
                        path.unlink()

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def _named(draft: Path, path: Path) -> bool:
    """Give the draft a second name in one go; False if there is such a name."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        # Of a network file system, the answer to a first request may have been lost.
        with suppress(FileNotFoundError):
            return os.path.samestat(draft.lstat(), path.lstat())
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(draft.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    return True
