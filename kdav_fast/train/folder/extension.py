"""Training a run further than its config said at first: what that needs, and what it means for the schedule."""

from pathlib import Path

from kdav_fast.checkpoint.folders import checkpoint_folders
from kdav_fast.checkpoint.manifest import step_of
from kdav_fast.config import Config
from kdav_fast.errors import InputError
from kdav_fast.student.file import CHECKPOINTS, FILE_NAME, StudentCard, read_file_card

_EXACT = ("constant", "step")
"""Schedules whose rate at a step is the same however long the run is."""


def is_complete(config: Config) -> bool:
    """Whether the run's folder holds the student of all its epochs: that of fewer means that it was extended since."""
    card = _final_card(config.run_dir)
    if card is None:
        return False
    # The files of earlier versions tell only the epochs that were reached, rounded.
    reached = card.epoch * 1.001 if card.epochs is None else card.epochs
    return reached >= config.train.epochs


def check_extension(config: Config) -> None:
    """Raise `InputError` if a complete run is to be trained further and has kept nothing to continue from."""
    if is_complete(config) or _final_card(config.run_dir) is None:
        return
    # A checkpoint of step 0 is that of what is measured before training.
    if not any(step_of(folder) for folder in checkpoint_folders(config.run_dir / CHECKPOINTS)):
        raise InputError(
            f"run_dir {config.run_dir} has a student but no checkpoint of its training (train.save_every was 0 or "
            "longer than the run, or it was removed), so it cannot be extended; train anew in another run_dir"
        )


def extension_line(config: Config, epochs: float, step: int, steps: int) -> str:
    """What a person must know when a run of `epochs` goes on from `step` to `steps`."""
    grown = f"from {epochs:g} to {config.train.epochs:g} epochs"
    said = f"extending {config.run_dir} {grown}, after step {step} of {steps}: "
    if config.schedule.name in _EXACT:
        return said + f"as if it had been begun with them (schedule '{config.schedule.name}')"
    return said + (
        f"from here on the learning rates are those of '{config.schedule.name}' over all {steps} steps; the steps "
        "before had those of the shorter run, so it is not the same as a run begun with them"
    )


def _final_card(run_dir: Path) -> StudentCard | None:
    file = run_dir / FILE_NAME
    return read_file_card(file) if file.exists() else None
