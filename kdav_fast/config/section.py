"""What every section of the config is made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _named(path: Any) -> Any:
    if path == "":
        raise ValueError("give a path, '.' for this folder")
    if isinstance(path, str) and "\0" in path:
        raise ValueError("a path holds no such character")
    return path


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("it has no known home directory; write the path out") from None


# YAML knows neither tuples nor paths: these two are made from lists and strings, all else is as given.
Lenient = Field(strict=False)
Triple = Annotated[tuple[float, float, float], Lenient]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
ExpandedPath = Annotated[Path, Lenient, BeforeValidator(_named), AfterValidator(_expanded)]
Range = Annotated[tuple[Positive, Positive], Lenient]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
