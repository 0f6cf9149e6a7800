"""Where a report draws each logged key, and what it calls it.

A figure has a panel a name, with a curve for training and one for validation: `train/NAME` and `val/NAME`. `loss` is
the loss and `loss/PART` its parts.
"""

from collections.abc import Iterable

LABELS = {
    "loss": "loss (nats)",
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "lr": "learning rate",
    "images_per_second": "throughput (images/s)",
    "data_wait_share": "waiting for data (share)",
}
UNITS = {"_kl": "nats", "_entropy": "nats", "_ms": "ms", "_seconds": "s", "_bytes": "bytes"}
FIGURES = ("losses", "accuracy", "learning_rate", "throughput")  # then those of keys unknown here
_PART = "loss/"


def panels(keys: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Figure name -> panel name -> keys drawn in it."""
    figures: dict[str, dict[str, list[str]]] = {figure: {} for figure in FIGURES}
    for key in keys:
        if key not in ("step", "epoch", "val/images"):
            figures.setdefault(_figure(key), {}).setdefault(split_and_name(key)[1], []).append(key)
    return {figure: drawn for figure, drawn in figures.items() if drawn}


def split_and_name(key: str) -> tuple[str, str]:
    """`train/loss` -> ("train", "loss"): both splits of a name share a panel. Other keys keep their name."""
    head, separator, tail = key.partition("/")
    return (head, tail) if separator and head in ("train", "val") else ("", key)


def axis_label(name: str) -> str:
    """Of a panel, with its unit where that is known."""
    words = name.removeprefix(_PART).replace("_", " ").replace(" kl", " KL")
    unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), None)
    return LABELS.get(name, f"{words} ({unit})" if unit else words)


def _figure(key: str) -> str:
    split, name = split_and_name(key)
    if name in ("top1", "top5"):
        return "accuracy"
    if name == "lr":
        return "learning_rate"
    if name in ("images_per_second", "data_wait_share"):
        return "throughput"
    if split and (name == "loss" or name.startswith(_PART)):
        return "losses"
    head, separator, _ = name.partition("/")
    family = head if separator else "other"
    return "".join(letter if letter.isalnum() else "_" for letter in family)
