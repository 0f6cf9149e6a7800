"""What the student learns from: one interface, one file a method."""

from importlib import import_module

from kdav_fast.config.method import MethodConfig
from kdav_fast.distillers.base import Distiller, Facts

__all__ = ["build_distiller", "find_method"]


def find_method(name: str) -> type[Distiller]:
    """The method of that name; of `config.method.method_names`."""
    return import_module(f"{__name__}.{name}").METHOD


def build_distiller(config: MethodConfig, facts: Facts) -> Distiller:
    """The distiller that a config names.

    Raises:
        InputError: it does not go with what is known before training.
        TypeError: the method's file is wrong: it has a parameter, which nobody would train.
    """
    distiller = find_method(config.name)(config, facts)
    for name, _ in distiller.named_parameters():
        raise TypeError(
            f"distiller '{config.name}' has the parameter {name}, which nothing would train; what is trained belongs "
            "in its learned() or its head()"
        )
    return distiller
