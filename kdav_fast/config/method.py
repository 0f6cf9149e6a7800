"""The distiller section: which methods there are, and what every method's section says of the runs it goes with."""

from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import ClassVar

from kdav_fast.config.section import Section
from kdav_fast.config.training import TrainConfig

_HOME = "kdav_fast.distillers"
_INTERFACE = ("__init__.py", "base.py", "phases.py")


class MethodConfig(Section):
    """What a method's own section, `Config` in its file, is made of: keys, defaults, and what it asks of a run.

    The class variables may be properties instead, where they depend on the section's values.
    """

    name: str
    """The method's, which is that of its file."""

    needs_teacher: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = True
    """Whether the loss uses the labels, so that `train.label_smoothing` means something."""
    takes_mixed: ClassVar[bool] = True
    """Whether it can use images of mixup and CutMix, whose labels are class shares."""

    def check_run(self, train: TrainConfig) -> None:
        """Raise `ValueError`, which names the keys, for a run that the method does not go with."""


@cache
def method_names() -> tuple[str, ...]:
    """Every method there is: one a file of `distillers/`."""
    found = (file.name for file in files(_HOME).iterdir() if file.is_file())
    return tuple(
        sorted(name.removesuffix(".py") for name in found if name.endswith(".py") and name not in _INTERFACE)
    )


def method_config(name: str) -> type[MethodConfig]:
    """The section of a method of `method_names`. Loads its file, and torch with it."""
    return import_module(f"{_HOME}.{name}").METHOD.Config
