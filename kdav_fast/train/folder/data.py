"""Which images a run is trained on: written into its folder at the beginning, compared whenever it continues."""

import json
from pathlib import Path

from kdav_fast.config import Config
from kdav_fast.data.fingerprint import Fingerprint, difference, same_names
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole

FILE_NAME = "data.json"


def check_run_data(config: Config, here: Fingerprint) -> None:
    """Raise `InputError` if the run in the folder was begun with other images, unless `data.on_change` accepts them.

    That names or labels of training images are others is no matter of accepting: the saved position in their order
    would mean other images.
    """
    there = _read(config.run_dir / FILE_NAME)
    if there is None:
        return  # a new run, or one begun by a version that did not write this
    different = difference(there, here)
    acceptable = same_names(there, here, "train")
    if different is None or (acceptable and config.data.on_change == "accept"):
        return
    accept = ", or accept these by data.on_change=accept" if acceptable else ""
    raise InputError(
        f"run_dir {config.run_dir} was begun with other images than {config.data.root or 'the digits'} holds: "
        f"{different}; put the former ones back, or use another run_dir{accept}"
    )


def write_run_data(run_dir: Path, here: Fingerprint) -> None:
    """Write what the run is trained on; `InputError` if it cannot be written."""
    file = run_dir / FILE_NAME
    try:
        write_whole(file, json.dumps(here) + "\n")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; give a folder that can be written") from None


def _read(file: Path) -> Fingerprint | None:
    try:
        content = json.loads(file.read_bytes())
        difference(content, content)  # reads all that a comparison reads
        return content
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; make it readable") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f"{file} is damaged, so that it is unknown with which images the run was begun; restore it, or remove it "
            "to continue with those that are there"
        ) from None
