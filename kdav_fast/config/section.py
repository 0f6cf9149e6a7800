"""What every section of the config is made of."""

import os
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _named(path: Any) -> Any:
    if path == "":
        raise ValueError("give a path, '.' for this folder")
    if isinstance(path, str) and "\0" in path:
        raise ValueError("a path holds no such character")
    return path


def _expanded(path: Path) -> Path:
    try:
        path = path.expanduser()
        names = [len(os.fsencode(name)) for name in path.parts]
    except RuntimeError:
        raise ValueError("it has no known home directory; write the path out") from None
    except UnicodeEncodeError:  # half of a pair of UTF-16, as YAML's \\u may give it
        raise ValueError("a path holds no such character") from None
    if max(names, default=0) > 255 or sum(names) + len(names) > 4095:
        raise ValueError("no file system takes so long a path; shorten it")
    return path


def _beta(parameter: float) -> float:
    # Beyond these, float32 draws from another distribution or from none.
    if parameter != 0 and not 0.01 <= parameter <= 1e6:
        raise ValueError("give 0, which is off, or 0.01 to 1000000")
    return parameter


class Mark(Enum):
    """What is known of a key beyond its values; SIZE: what a run takes of memory grows with it."""

    MAY_CHANGE = auto()
    OF_MACHINE = auto()
    SIZE = auto()


_Type = TypeVar("_Type")
MayChange = Annotated[_Type, Mark.MAY_CHANGE]
"""Of a key that says where or how fast a run runs, not what it computes: it may change on a restart."""
OfMachine = Annotated[_Type, Mark.MAY_CHANGE, Mark.OF_MACHINE]
"""Of a key that, besides, may differ among a run's processes: it says how the machine of each one works."""


def within(low: float, high: float, why: str) -> Any:
    """Bounds of a number, both allowed, and what the user is told of the reason."""
    return Field(ge=low, le=high, json_schema_extra={"why": why})


# YAML knows neither tuples nor paths: these two are made from lists and strings, all else is as given.
Lenient = Field(strict=False)
Triple = Annotated[tuple[float, float, float], Lenient]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Temperature = Annotated[float, within(0.01, 1000.0, "in float32 a softmax beyond is one class, or all alike")]
"""Of a softmax; its square scales a loss."""
_DROWNED = "a larger one drowns the other terms in float32's rounding"
Weight = Annotated[float, within(0.0, 1e6, _DROWNED)]
"""Of a term of a loss; 0: off."""
PositiveWeight = Annotated[float, Field(gt=0, le=1e6, json_schema_extra={"why": _DROWNED})]
Width = Annotated[int, within(1, 16384, "a wider layer has more weights than any network here"), Mark.SIZE]
"""Features or channels of a learned layer."""
Stages = Annotated[int, within(1, 64, "no network has more feature maps")]
"""How many of the last ones."""
Epochs = Annotated[float, within(0.0, 10_000.0, "no run is that long")]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
BetaParameter = Annotated[float, AfterValidator(_beta)]
"""Of the symmetric beta distribution; 0 where it is off."""
ExpandedPath = Annotated[Path, Lenient, BeforeValidator(_named), AfterValidator(_expanded)]
Range = Annotated[tuple[Positive, Positive], Lenient]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def keys_marked(mark: Mark, section: Section, prefix: str = "") -> set[str]:
    """The dotted keys of a section, and of those within it, that bear the mark."""
    keys = set()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            keys |= keys_marked(mark, value, f"{prefix}{name}.")
        elif mark in field.metadata:
            keys.add(prefix + name)
    return keys
