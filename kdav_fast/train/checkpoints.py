"""What a run needs to continue as if it had never stopped: what is saved and when, and how it is restored."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdav_fast.checkpoint.folders import CheckpointFolders
from kdav_fast.checkpoint.pieces import restore_training_state, training_state
from kdav_fast.errors import InputError, named, one_line
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.file import CHECKPOINTS, FILE_NAME, student_bytes
from kdav_fast.train.folder.config import config_digest
from kdav_fast.train.phases import PhasePosition, Restored, momentum
from kdav_fast.train.run import Run

_FORMAT = 2
"""Of what lies in a checkpoint: another one is refused."""
_DISTILLER = "distiller.safetensors"
_AVERAGE = "average.safetensors"
_LEARNED = "learned.safetensors"
_MOMENTUM = "momentum.safetensors"
_SUM = "sum:"


@dataclass
class Position:
    """Where a run stands."""

    step: int | None = None
    """Optimizer steps done; None: distillation has not begun."""
    phases: PhasePosition = field(default_factory=PhasePosition)


class Checkpoints:
    """The checkpoints of a run. Every rank calls every method alike.

    Each rank saves its pieces of weights and optimizer state, its own BatchNorm statistics, loader position and
    random state. What is the same on all ranks, the first one saves: distiller, average weights, and the student as
    it would be evaluated.

    Args:
        run: whose.
        before_write: called by the first rank before it changes anything; may raise `InputError`.
        read_only: nothing is changed; nothing is saved.
    """

    def __init__(
        self, run: Run, before_write: Callable[[], None] = lambda: None, read_only: bool = False
    ) -> None:
        self._run, self._train = run, run.config.train
        self._folders = CheckpointFolders(
            run.run_dir / CHECKPOINTS,
            run.cluster,
            self._train.keep_checkpoints,
            self._train.keep_best,
            before_write=before_write,
            read_only=read_only,
        )

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part of a checkpoint."""
        return self._folders.writing

    def after_step(
        self, step: int, *, due: bool, wait: bool, writing: bool, score: float | None = None
    ) -> None:
        """Begin to save if it is due, and finish what was begun as soon as no rank is writing any more.

        Args:
            step: optimizer steps done.
            due: save the run as it is now.
            wait: until it is saved; with `train.async_checkpoints` off, that is always so.
            writing: whether any rank was writing when all were last asked.
            score: accuracy of this student, if it was measured.
        """
        if due:
            self.save(step, score)
            if wait or not self._train.async_checkpoints:
                self.finish()
        # What was begun after the others were asked may still be in work there.
        elif self._folders.pending is not None and not writing and self._folders.pending < step - 1:
            self.finish()

    def finish(self) -> None:
        """Wait until what was begun is saved."""
        self._folders.finish()

    def save(self, step: int, score: float | None = None) -> None:
        """Begin to save everything, as it is now."""
        run = self._run
        pieces, groups = training_state(run.engine, run.cluster)
        contents = {
            _pieces_file(run.cluster.rank): save(pieces),
            **self._of_this_rank({"optimizer_groups": groups, "loader": run.loaders.train.state_dict()}),
        }
        with run.savable():
            # Before a step was taken, there is no student.
            weights = run.evaluated_student.weights() if step > run.skipped_steps else None
        if run.cluster.is_first:
            contents |= self._of_all_ranks()
            if weights:
                contents[FILE_NAME] = student_bytes(weights, run.card(step))
            if run.average is not None:
                contents[_AVERAGE] = save(_portable(run.average.state_dict()))
        facts = {"score": score, "loss_scale": run.engine.loss_scale.state_dict()}
        self._begin(step, contents, {**facts, "skipped_steps": run.skipped_steps})

    def save_phase(self, position: PhasePosition) -> None:
        """Save where a run stands before distillation."""
        run = self._run
        # Copies: they may be buffers of the head, which are saved too.
        sums = {f"{_SUM}{number}": tensor.clone() for number, tensor in enumerate(position.sums)}
        contents = self._of_this_rank({"loader": position.loader.state_dict()}, sums)
        if run.cluster.is_first:
            contents |= self._of_all_ranks()
            contents[_LEARNED] = save(_portable(run.trainee.learned.state_dict()))
            contents[_MOMENTUM] = save(_portable(momentum(position)))
        self._begin(0, contents, {"phase": position.number, "batches": position.step})
        self.finish()

    def _of_this_rank(self, state: dict[str, Any], sums: dict[str, Tensor] | None = None) -> dict[str, bytes]:
        cluster = self._run.cluster
        state = {**state, "random": _random_state(cluster)}
        return {
            _buffers_file(cluster.rank): save(_portable({**_buffers(self._run), **(sums or {})})),
            _rank_file(cluster.rank): json.dumps(state).encode(),
        }

    def _of_all_ranks(self) -> dict[str, bytes]:
        return {_DISTILLER: save(_portable(self._run.distiller.state_dict()))}

    def _begin(self, step: int, contents: dict[str, bytes], facts: dict[str, Any]) -> None:
        self._folders.begin(step, contents, {"format": _FORMAT, **self._identity(), **facts})

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run; of `world`, see `restore`."""
        run = self._run
        return {
            "world": run.cluster.world,
            "distiller": run.config.distiller.name,
            "config": config_digest(run.config),
            "teacher": run.teacher_checksum,
        }

    def _check_identity(self, folder: Path, manifest: dict[str, Any]) -> None:
        here = self._identity()
        if manifest.get("config") != here["config"]:
            raise InputError(
                f"{folder} is of another run, with distiller.name '{manifest.get('distiller')}' or other settings than "
                "config.yaml beside it says; put the run's own checkpoints back, or start anew in another run_dir"
            )
        if manifest.get("teacher") != here["teacher"]:
            raise InputError(
                f"{folder} was written with another teacher than the weights in teacher.checkpoint are now "
                f"(checksum {manifest.get('teacher')} there, {here['teacher']} here); put the former ones back, or "
                "start anew in another run_dir"
            )

    def restore(self) -> Position | None:
        """Restore the newest intact checkpoint, starting the engine if distillation had begun; None if there is none.

        Another number of processes may continue it with `data.on_reshard=restart_epoch`: weights, optimizer and memory
        are exact; BatchNorm statistics are the mean over its ranks; the loaders begin its epoch anew, and the random
        states of mixing follow from seed, step and rank. What comes before distillation is then begun anew.

        Raises:
            InputError: all checkpoints are damaged, or the newest intact one is of another form, or was written by
                another number of processes and that is not allowed.
        """
        found = self._folders.newest_intact()
        if found is None:
            return None
        folder, manifest = found
        if manifest.get("format") != _FORMAT:
            raise InputError(
                f"{folder} is of a run that another version of kdav_fast began, which this one cannot continue; finish "
                "it with that version, or start anew in another run_dir"
            )
        self._check_identity(folder, manifest)
        try:
            return _Restoration(self._run, folder, manifest).restore()
        except InputError:
            raise
        except (SafetensorError, ValueError, TypeError, LookupError) as error:
            raise InputError(
                f"{folder} is what its manifest says, but no checkpoint that this version can read "
                f"({named(error)}); remove it to continue from an earlier one, or start anew in another run_dir"
            ) from None


class _Restoration:
    """Of a run out of a checkpoint's folder."""

    def __init__(self, run: Run, folder: Path, manifest: dict[str, Any]) -> None:
        self._run, self._folder, self._manifest = run, folder, manifest
        self._written_by = manifest["world"]
        self._resharded = self._written_by != run.cluster.world

    def restore(self) -> Position | None:
        run, cluster = self._run, self._run.cluster
        if self._resharded and run.config.data.on_reshard == "refuse":
            raise InputError(
                f"{self._folder} was written by {self._written_by} processes and this run has {cluster.world}; "
                f"continue with {self._written_by}, set data.on_reshard=restart_epoch, or start anew in another run_dir"
            )
        if "phase" not in self._manifest:
            return self._restore_training()
        if self._resharded:
            cluster.say(
                f"{self._folder} was written by {self._written_by} processes in the middle of what comes before "
                f"distillation; {cluster.world} begin that anew"
            )
            return None
        return self._restore_phase()

    def _restore_training(self) -> Position:
        run, cluster, manifest = self._run, self._run.cluster, self._manifest
        run.start_engine()
        # What the loaders and the optimizer need of another number of ranks, the first one's file tells as well.
        state = self._rank_state(0 if self._resharded else cluster.rank)
        pieces = [self._file(_pieces_file(rank)) for rank in range(self._written_by)]
        restore_training_state(run.engine, cluster, pieces, state["optimizer_groups"])
        run.engine.restore_loss_scale(manifest["loss_scale"])
        run.skipped_steps = manifest["skipped_steps"]
        self._restore_distiller()
        if run.average is not None:
            run.average.load_state_dict(self._tensors(_AVERAGE))
        ranks = range(self._written_by) if self._resharded else [cluster.rank]
        _restore_buffers(run, [self._tensors(_buffers_file(rank), "cpu") for rank in ranks])
        run.engine.remember_buffers()
        run.loaders.train.load_state_dict(state["loader"])
        if self._resharded:
            entropy = (run.config.train.seed, manifest["step"], cluster.rank)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            cluster.say(
                f"{self._folder} was written by {self._written_by} processes; {cluster.world} continue it, beginning "
                "its epoch anew"
            )
        else:
            _restore_random_state(state["random"], cluster)
        return Position(manifest["step"], PhasePosition(len(tuple(run.distiller.phases()))))

    def _restore_phase(self) -> Position:
        run, rank = self._run, self._run.cluster.rank
        state = self._rank_state(rank)
        self._restore_distiller()
        self._load(run.trainee.learned, _LEARNED)
        buffers = self._tensors(_buffers_file(rank), "cpu")
        _restore_buffers(run, [buffers])
        number = self._manifest["phase"]
        phase = tuple(run.distiller.phases())[number]
        for sum_number, summed in enumerate(getattr(phase, "sums", ())):
            summed.copy_(buffers[f"{_SUM}{sum_number}"])
        _restore_random_state(state["random"], run.cluster)
        restored = Restored(state["loader"], self._tensors(_MOMENTUM))
        return Position(None, PhasePosition(number, self._manifest["batches"], restored=restored))

    def _restore_distiller(self) -> None:
        self._load(self._run.distiller, _DISTILLER)

    def _load(self, module: nn.Module, name: str) -> None:
        # By way of the host: what is kept there may not fit the device, and loading copies into place.
        try:
            module.load_state_dict(self._tensors(name, "cpu"))
        except RuntimeError as error:
            raise InputError(
                f"{self._folder}: {name} is of another form than what distiller.name "
                f"'{self._run.config.distiller.name}' keeps now ({one_line(error)}); continue with the version that "
                "wrote it, or start anew in another run_dir"
            ) from None

    def _rank_state(self, rank: int) -> dict[str, Any]:
        return json.loads(self._file(_rank_file(rank)).read_text(encoding="utf-8"))

    def _tensors(self, name: str, device: str | None = None) -> dict[str, Tensor]:
        return load_file(self._file(name), device=device or str(self._run.cluster.device))

    def _file(self, name: str) -> Path:
        if name not in self._manifest["files"]:
            raise KeyError(f"{name} is not in the manifest")
        return self._folder / name


def _buffers(run: Run) -> dict[str, Tensor]:
    """Every buffer of what is trained and of the average: BatchNorm's, and the head's centre and class sums."""
    named = dict(run.trainee.named_buffers())
    if run.average is not None:
        named |= run.average.named_buffers(prefix="average")
    return named


def _sums(run: Run) -> set[str]:
    """Names of those buffers that are sums over what a process has seen."""
    return {
        f"{path}.{name}"
        for path, module in [*run.trainee.named_modules(), *_average_modules(run)]
        for name in getattr(module, "SUMS", ())
    }


def _average_modules(run: Run) -> list:
    return [] if run.average is None else list(run.average.named_modules(prefix="average"))


@torch.no_grad()
def _restore_buffers(run: Run, saved: list[dict[str, Tensor]]) -> None:
    """This rank's own, or out of all ranks of another number of processes."""
    sums = _sums(run)
    for name, buffer in _buffers(run).items():
        values = torch.stack([state[name] for state in saved])
        if values.shape[1:] != buffer.shape:
            raise ValueError(f"{name} is of another shape")
        if len(saved) == 1 or not buffer.is_floating_point():
            buffer.copy_(values[0])
        elif name in sums:
            buffer.copy_(values.sum(0) / run.cluster.world)  # so that the sum over ranks stays what it was
        else:
            buffer.copy_(values.mean(0))


def _portable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes it: it knows no strides."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _pieces_file(rank: int) -> str:
    return f"pieces-{rank:05d}.safetensors"


def _buffers_file(rank: int) -> str:
    return f"buffers-{rank:05d}.safetensors"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _random_state(cluster: Cluster) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if cluster.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(cluster.device)
    return {name: base64.b64encode(bytes(state.tolist())).decode("ascii") for name, state in states.items()}


def _restore_random_state(states: dict[str, Any], cluster: Cluster) -> None:
    decoded = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if "cuda" in decoded and cluster.device.type == "cuda":
        torch.cuda.set_rng_state(decoded["cuda"], cluster.device)
