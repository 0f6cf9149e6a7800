"""The run's folder: one config, written once, and an answer to "is this the same run?"."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch

from kdav_fast.config import Config, dump_config, flat, parse_config
from kdav_fast.config.documents import DocumentError, parse_yaml, read_document
from kdav_fast.config.section import Mark, keys_marked
from kdav_fast.errors import InputError
from kdav_fast.runtime.agreement import method_first
from kdav_fast.runtime.files import write_whole
from kdav_fast.runtime.precision import Format, resolve_precision

_FILE = "config.yaml"


def check_run_folder(config: Config, extend: bool = False) -> float | None:
    """Raise `InputError` if the folder belongs to another config; it names the first differing key.

    A key that the folder's version did not know has its default: it is what that run did.

    Args:
        config: of this start.
        extend: `train.epochs` may be more than there.

    Returns:
        The folder's `train.epochs`, if this start extends them.
    """
    file = config.run_dir / _FILE
    if not file.exists():
        if extend:
            raise InputError(f"run_dir {config.run_dir} holds no run that could be extended; drop --extend")
        return None
    saved = read_run_config(config.run_dir)
    try:
        there = flat(parse_config(saved).model_dump(mode="json"))
    except InputError as error:
        raise InputError(
            f"run_dir {config.run_dir} cannot be continued: {error}; use another run_dir"
        ) from None
    here = flat(config.model_dump(mode="json"))
    if there["train.precision"] == "auto":  # later versions write down what it stands for
        raise InputError(
            f"run_dir {config.run_dir} was begun by another version of kdav_fast, whose runs this one cannot continue; "
            "finish it with that version, or start anew in another run_dir"
        )
    may_change = keys_marked(Mark.MAY_CHANGE, config)
    epochs, wanted = there["train.epochs"], here["train.epochs"]
    for key in sorted(there.keys() | here.keys(), key=method_first):
        if there.get(key) == here.get(key) or key in may_change:
            continue
        remedy = "use the same value to continue that run, or another run_dir"
        if key == "train.epochs" and extend and wanted > epochs:
            continue
        if key == "train.epochs" and wanted > epochs:
            remedy = (
                "use the same value to continue that run, --extend to train it further, or another run_dir"
            )
        elif key == "train.epochs":
            remedy = "a run can be extended but not shortened: use the same value, or another run_dir"
        raise InputError(
            f"run_dir {config.run_dir} belongs to another config: {key} is {there.get(key)!r} there and "
            f"{here.get(key)!r} here; {remedy}"
        )
    return epochs if wanted > epochs else None


def config_digest(config: Config) -> str:
    """Of every key that must be the same for a checkpoint to mean the same run, however long that is to be."""
    # What precision `auto` stands for, each start finds for itself.
    may_change = keys_marked(Mark.MAY_CHANGE, config) | {"train.epochs", "train.precision"}
    keys = sorted(flat(config.model_dump(mode="json")).items())
    content = repr([(key, value) for key, value in keys if key not in may_change])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def precision_of_run(config: Config, device: torch.device) -> Format:
    """`train.precision`, or what `auto` stands for: what the folder's run began with, else what is faster here."""
    if config.train.precision == "auto" and (config.run_dir / _FILE).exists():
        section = read_run_config(config.run_dir).get("train")
        begun = section.get("precision") if isinstance(section, dict) else None
        if begun in get_args(Format):
            return begun
    return resolve_precision(config.train.precision, device, config.data.image_size)


def config_facts(config: Config) -> dict[str, str]:
    """What all processes of a run must have alike: each key but a machine's own, and what DeepSpeed's file holds."""
    of_machine = keys_marked(Mark.OF_MACHINE, config)
    facts = {
        key: repr(value)
        for key, value in flat(config.model_dump(mode="json")).items()
        if key not in of_machine
    }
    if config.train.deepspeed is not None:
        with suppress(OSError, DocumentError):  # who needs it will say so
            content = read_document(config.train.deepspeed).encode()
            facts["the content of train.deepspeed"] = hashlib.sha256(content).hexdigest()[:12]
    return facts


def write_run_config(config: Config) -> None:
    """Make the folder and write the resolved config; `InputError` if it cannot be written."""
    file = config.run_dir / _FILE
    try:
        write_whole(file, dump_config(config))
    except OSError as error:
        raise InputError(
            f"run_dir {config.run_dir}: {error.strerror}; give a folder that can be written"
        ) from None


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The config saved in a run's folder; raises `InputError` if there is none or it is damaged."""
    file = run_dir / _FILE
    try:
        raw = parse_yaml(read_document(file))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; give the run_dir of a run") from None
    except DocumentError:
        raw = None
    if not isinstance(raw, dict):
        raise InputError(f"{file} is damaged; restore it, or use another run_dir")
    return raw
