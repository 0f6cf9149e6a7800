"""What the student learns from: one interface, one file a method."""

from importlib import import_module

from kdav_fast.config.method import MethodConfig
from kdav_fast.distillers.base import Distiller, Facts
from kdav_fast.distillers.checks import check_method
from kdav_fast.errors import InputError, lack_of_memory

__all__ = ["build_distiller", "find_method"]


def find_method(name: str) -> type[Distiller]:
    """The method of that name; of `config.method.method_names`."""
    return import_module(f"{__name__}.{name}").METHOD


def build_distiller(config: MethodConfig, facts: Facts) -> Distiller:
    """The distiller that a config names.

    Raises:
        InputError: it does not go with what is known before training, or into memory.
        TypeError: the method's file is wrong; the message says what it must give.
    """
    config.check_classes(facts.classes)
    try:
        distiller = find_method(config.name)(config, facts)
    except (MemoryError, RuntimeError) as error:
        if config.sizes() and (lack := lack_of_memory(error)):
            lower = " or ".join(config.sizes())
            raise InputError(
                f"distiller.name '{config.name}' does not fit into memory ({lack}); lower {lower}"
            ) from error
        raise
    try:
        check_method(distiller)
    except TypeError as error:
        raise TypeError(f"distiller '{config.name}': {error}") from None
    return distiller
