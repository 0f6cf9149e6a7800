"""Checkpoints as folders of files: each whole or not there, with checksums, and never damaged by a later one.

A save goes through these stages, and a crash in any of them leaves the checkpoints before it: every rank writes its
files to a temporary folder and flushes them to the disk; when all have, the first rank adds a manifest of sizes and
checksums, its own included, gives the folder its name, and lets `latest` name it. Nothing is read before it matches the
manifest.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdav_fast.checkpoint.manifest import (
    FOLDER_NAME,
    MANIFEST,
    defect,
    manifest_bytes,
    read_manifest,
    record_of,
    step_of,
)
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import TEMPORARY, flush_folder, write_flushed, write_whole
from kdav_fast.runtime.processes import Cluster

LATEST = "latest"


class CheckpointFolders:
    """Writes checkpoints and finds the newest intact one. Every rank calls every method alike.

    Args:
        root: the folder that holds them; of all ranks the same, also on several hosts.
        cluster: the run's processes.
        keep: how many of the newest to keep.
        keep_best: keep the one with the highest score too.
        before_write: called by the first rank before it changes anything; may raise `InputError`.
        read_only: `newest_intact` changes nothing; nothing is saved.
    """

    def __init__(
        self,
        root: Path,
        cluster: Cluster,
        keep: int,
        keep_best: bool,
        before_write: Callable[[], None] = lambda: None,
        read_only: bool = False,
    ) -> None:
        self._root, self._cluster, self._keep, self._keep_best = root, cluster, keep, keep_best
        self._before_write, self._read_only = before_write, read_only
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Path, dict[str, Any], Future] | None = None
        self._damaged: list[Path] = []  # newer than the one that the run continues from

    @property
    def pending(self) -> int | None:
        """The step whose save was begun and is not finished."""
        return self._pending and self._pending[0]

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part of it."""
        return self._pending is not None and not self._pending[3].done()

    def begin(self, step: int, contents: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Start to write this rank's files, in a thread; finishes an earlier save first.

        Args:
            step: optimizer steps done.
            contents: bytes by file name; names differ between ranks.
            facts: what the manifest says besides; `score` tells which one is the best. Of the first rank.

        Raises:
            InputError: the earlier save failed, or the folder cannot be made.
        """
        self.finish()
        temporary = self._root / f"step-{step:08d}{TEMPORARY}"

        def make() -> None:
            self._before_write()
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                for leftover in self._root.glob(f"step-*{TEMPORARY}"):  # of a save that a crash interrupted
                    shutil.rmtree(leftover)
                # They must not count as the newest ones to keep, and the run will come to their steps again.
                for folder in self._damaged:
                    shutil.rmtree(folder)
                self._damaged = []
                temporary.mkdir()
            except OSError as error:
                raise _not_written(step, error.strerror) from None

        self._cluster.on_first(make)
        self._pending = (step, temporary, dict(facts), self._writer.submit(_write_all, temporary, contents))

    def finish(self) -> None:
        """Wait until every rank has written its files, then give the checkpoint its name and drop old ones.

        Raises:
            InputError: a rank could not write; what was written is removed, earlier checkpoints are as they were.
        """
        if self._pending is None:
            return
        step, temporary, facts, written = self._pending
        self._pending = None
        outcomes = self._cluster.gather(written.result())
        failures = [f"rank {rank}: {o}" for rank, o in enumerate(outcomes) if isinstance(o, str)]
        files = {name: record for o in outcomes if not isinstance(o, str) for name, record in o.items()}

        def publish() -> None:
            self._before_write()  # else even what is removed may be another run's
            try:
                if failures:
                    raise _not_written(step, "; ".join(failures))
                write_flushed(temporary / MANIFEST, manifest_bytes({"step": step, **facts, "files": files}))
                flush_folder(temporary)
                self._name(step, temporary)
                self._drop_old()
            except OSError as error:
                raise _not_written(step, error.strerror) from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

        self._cluster.on_first(publish)

    def newest_intact(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose files are those of its manifest, and the manifest; None if there is none at all.

        Says which ones are damaged, and how; lets `latest` name the one found.

        Raises:
            InputError: there are checkpoints, but all are damaged.
        """
        folders = self._cluster.on_first(self._newest_first)
        for damaged, folder in enumerate(folders):
            manifest, problem = read_manifest(folder)
            mine = list(manifest["files"].items())[self._cluster.rank :: self._cluster.world]
            found = [problem, *(defect(folder / name, record) for name, record in mine)]
            problems = [problem for problem in found if problem]
            problems = sorted({problem for theirs in self._cluster.gather(problems) for problem in theirs})
            if not problems:
                self._damaged = folders[:damaged]
                if damaged:
                    self._cluster.say(f"using {folder} instead")
                self._cluster.on_first(lambda found=folder: self._mend_pointer(found))
                return folder, manifest
            self._cluster.say(f"checkpoint {folder} is damaged: {'; '.join(problems)}")
        if folders:
            raise InputError(
                f"every checkpoint in {self._root} is damaged; restore one from a copy, or remove that folder to begin "
                "the run anew"
            )
        return None

    def _newest_first(self) -> list[Path]:
        folders = sorted(checkpoint_folders(self._root), key=step_of, reverse=True)
        pointer = self._root / LATEST
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
            if name not in [folder.name for folder in folders]:
                self._cluster.say(
                    f"{pointer} names {name!r}, which is not there; looking for other checkpoints"
                )
        return folders

    def _name(self, step: int, temporary: Path) -> None:
        folder = self._root / f"step-{step:08d}"
        # Before distillation, every save is of step 0; a crash between the two renames begins the run anew.
        former = _set_aside(folder) if folder.exists() else None
        temporary.rename(folder)
        self._point_to(folder)
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)

    def _point_to(self, folder: Path) -> None:
        write_whole(self._root / LATEST, f"{folder.name}\n")

    def _mend_pointer(self, folder: Path) -> None:
        """A crash just before the pointer's turn leaves it one behind: of a finished run no save would put it right."""
        pointer = self._root / LATEST
        if self._read_only:
            return
        with suppress(OSError):  # the run itself does not need it, and may only be allowed to read
            if not pointer.is_file() or pointer.read_bytes() != f"{folder.name}\n".encode():
                self._point_to(folder)

    def _drop_old(self) -> None:
        folders = sorted(checkpoint_folders(self._root), key=step_of)
        kept = set(folders[-self._keep :])
        if self._keep_best:
            scores = {folder: read_manifest(folder)[0].get("score") for folder in folders}
            scored = [folder for folder in folders if scores[folder] is not None]
            if scored:
                kept.add(max(scored, key=lambda folder: (scores[folder], step_of(folder))))
        for folder in folders:
            if folder not in kept:
                _remove(folder)


def checkpoint_folders(root: Path) -> list[Path]:
    """Whole or damaged, in any order; none if there is no such folder."""
    return [path for path in root.glob("step-*") if FOLDER_NAME.fullmatch(path.name) and path.is_dir()]


def _remove(folder: Path) -> None:
    """So that a crash leaves no half of a checkpoint."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Take its name from a checkpoint."""
    return folder.rename(folder.with_name(f"{folder.name}-old{TEMPORARY}"))


def _write_all(folder: Path, contents: Mapping[str, bytes]) -> dict[str, dict[str, Any]] | str:
    """Records for the manifest, or what went wrong."""
    records = {}
    try:
        for name, content in contents.items():
            write_flushed(folder / name, content)
            records[name] = record_of(content)
    except OSError as error:
        return error.strerror or str(error)
    return records


def _not_written(step: int, reason: str) -> InputError:
    return InputError(
        f"the checkpoint of step {step} could not be written ({reason}); earlier ones are as they were: put that "
        "right, then the same command continues from the last of them"
    )
