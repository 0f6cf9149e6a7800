"""The distiller section: which methods there are, and what every method's section says of the runs it goes with.

A method's own keys are in its file, which loads torch. Its name can be looked at before.
"""

import inspect
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict

from kdav_fast.config.data import DataConfig
from kdav_fast.config.section import Mark, Section, keys_marked
from kdav_fast.config.training import TrainConfig

_HOME = "kdav_fast.distillers"
_INTERFACE = {"base", "checks", "phases"}


def method_files() -> dict[str, Path]:
    """Every method there is: one a file of `distillers/`; `none`, the default, first. Loads none of them."""
    files = iter_modules(find_spec(_HOME).submodule_search_locations)  # which does not load the package
    found = {
        file.name: Path(file.module_finder.path, f"{file.name}.py")
        for file in files
        if file.name.isidentifier() and not file.ispkg and file.name not in _INTERFACE
    }
    return dict(sorted(found.items(), key=lambda one: (one[0] != "none", one[0])))


def method_names() -> tuple[str, ...]:
    """The names of `method_files`."""
    return tuple(method_files())


def _known(name: str) -> str:
    if name not in method_names():
        raise ValueError(f"allowed: {', '.join(map(repr, method_names()))}")
    return name


class NamedMethod(Section):
    """A distiller section before its method's file is loaded: a name, and keys of which nothing is known yet."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, AfterValidator(_known)]


class MethodConfig(Section):
    """What a method's own section, `Config` in its file, is made of: keys, defaults, and what it asks of a run.

    The class variables may be properties instead, where they depend on the section's values.

    Raises:
        TypeError: a method's section has a key that is called as something of this class.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)  # which `kdav methods NAME` shows

    name: str
    """The method's, which is that of its file."""

    needs_teacher: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = True
    """Whether the loss uses the labels, so that `train.label_smoothing` means something."""
    takes_mixed: ClassVar[bool] = True
    """Whether it can use images of mixup and CutMix, whose labels are class shares."""

    needs_stages: ClassVar[bool] = False
    """Whether it wants `Outputs.stages`, of student and teacher."""
    needs_preactivations: ClassVar[bool] = False
    """Whether it wants `Outputs.preactivations`."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for key in inspect.get_annotations(cls):
            if key in cls.model_fields and (key in MethodConfig.model_fields or hasattr(MethodConfig, key)):
                raise TypeError(
                    f"{cls.__module__}.{cls.__qualname__} has the key '{key}', which is MethodConfig's; give the key "
                    "another name, or, where a class variable is meant, leave out its annotation"
                )

    def sizes(self) -> list[str]:
        """Its keys with which memory grows, and their values: what a message names."""
        return [f"distiller.{key} ({getattr(self, key)})" for key in sorted(keys_marked(Mark.SIZE, self))]

    def check_classes(self, classes: int) -> None:
        """Raise `InputError` for data of so few classes that the keys make no sense."""

    def check_run(self, train: TrainConfig) -> None:
        """Raise `ValueError`, which names the keys, for a run that the method does not go with."""

    def check_data(self, data: DataConfig) -> None:
        """As `check_run`, for the way that images are made ready."""


def method_config(name: str) -> type[MethodConfig]:
    """The section of a method of `method_names`. Loads its file, and torch with it.

    Raises:
        TypeError: the file does not say what its method is.
    """
    file = import_module(f"{_HOME}.{name}")
    config = getattr(getattr(file, "METHOD", None), "Config", None)
    if not (inspect.isclass(config) and issubclass(config, MethodConfig)):
        raise TypeError(f"{file.__file__}: METHOD must be a Distiller whose Config is a MethodConfig")
    return config


def method_section(raw: dict[str, Any]) -> MethodConfig:
    """A distiller section out of its keys and values; raises pydantic's `ValidationError`.

    Loads the method's file, and torch with it.
    """
    return method_config(NamedMethod.model_validate(raw).name).model_validate(raw)
