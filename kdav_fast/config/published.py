"""A recipe's `published` block: what the published run of a method sets otherwise than the recipe does.

    published:
      mld: {optimizer: {lr: 0.025}}

It is no part of a run's config. What stands there of the run's method is laid over the recipe, overrides come on top.
"""

from typing import Any

from kdav_fast.config.method import method_names
from kdav_fast.config.run import Sections
from kdav_fast.errors import InputError, shown

KEY = "published"
_SECTIONS = tuple(name for name in Sections.model_fields if name not in ("run_dir", "device"))


def take_published(raw: dict[str, Any]) -> dict[str, Any]:
    """Take the block out of a recipe's keys and values.

    Returns:
        The sections that it has for `distiller.name`; empty where it has none, or where there is no block.

    Raises:
        InputError: it is not one section of keys for each method.
    """
    block = raw.pop(KEY, None)
    if block is None:
        return {}
    if not isinstance(block, dict):
        raise InputError(f"'{KEY}' is {shown(block)}; give methods, and of each the sections that differ")
    for method, sections in block.items():
        if method not in method_names():
            raise InputError(
                f"'{KEY}.{method}' is of no method; allowed: {', '.join(map(repr, method_names()))}"
            )
        if not isinstance(sections, dict):
            raise InputError(
                f"'{KEY}.{method}' is {shown(sections)}; give the sections that differ, {{}} for none"
            )
        _check_entry(method, sections)
    distiller = raw.get("distiller", {})
    name = distiller.get("name", "none") if isinstance(distiller, dict) else None
    return block.get(name, {}) if isinstance(name, str) else {}


def _check_entry(method: str, sections: dict[str, Any]) -> None:
    """What the sections hold, the config's own checks look at once they are laid over."""
    for section, values in sections.items():
        place = f"{KEY}.{method}.{section}"
        if section not in _SECTIONS:
            raise InputError(f"'{place}' is no section; allowed: {', '.join(_SECTIONS)}")
        if not isinstance(values, dict):
            raise InputError(f"'{place}' is {shown(values)}; give the keys that differ, with their values")
        if section == "distiller" and "name" in values:
            raise InputError(f"'{place}.name' is of no use: what stands there is of '{method}'; leave it out")


def lay_over(raw: dict[str, Any], sections: dict[str, Any]) -> None:
    """Set the values of `sections` in `raw`, and leave what else its sections hold."""
    for key, value in sections.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            lay_over(raw[key], value)
        else:
            raw[key] = value
