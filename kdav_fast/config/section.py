"""What every section of the config is made of."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# YAML knows neither tuples nor paths: these two are made from lists and strings, all else is as given.
Lenient = Field(strict=False)
Triple = Annotated[tuple[float, float, float], Lenient]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
ExpandedPath = Annotated[Path, Lenient, AfterValidator(Path.expanduser)]
Range = Annotated[tuple[Positive, Positive], Lenient]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
