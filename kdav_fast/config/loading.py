"""From YAML and `key=value` overrides to a validated config, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdav_fast.config.documents import DocumentError, parse_yaml, read_document, written
from kdav_fast.config.explain import explain
from kdav_fast.config.published import KEY, lay_over, take_published
from kdav_fast.config.run import Config, Sections
from kdav_fast.errors import InputError, shown


def load_config(path: Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and validate.

    Args:
        path: YAML file; `None` starts from the defaults.
        overrides: dotted keys with YAML values, such as `train.epochs=3` or `data.mean=[0.5,0.5,0.5]`.

    Raises:
        InputError: the file cannot be read, or a key or value is not in the schema.
    """
    return parse_config(read_config(path, overrides))


def read_config(
    path: Path | None, overrides: list[str] = (), say: Callable[[str], object] = lambda line: None
) -> dict[str, Any]:
    """The keys and values that `load_config` would validate.

    Args:
        path: YAML file; `None` starts from the defaults.
        overrides: as `load_config` takes them; `published=null` leaves out the file's block of that name.
        say: is told in a line what comes from that block, if anything does.
    """
    raw = _read_yaml(path) if path else {}
    apply_overrides(raw, overrides)
    published = take_published(raw)
    if published:
        settings = ", ".join(f"{key}={written(value)}" for key, value in flat(published).items())
        method = raw.get("distiller", {}).get("name", "none")
        say(f"as published for '{method}': {settings} ({KEY}=null leaves it out)")
        lay_over(raw, published)
        # Once more, now that there is something to override. The method has been chosen.
        again = [one for one in overrides if not one.startswith(("distiller.name=", KEY))]
        apply_overrides(raw, again)
    return raw


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> None:
    """Set `key=value` overrides in a plain dictionary; raises `InputError` for one that is not of that form.

    Another `distiller.name` drops the keys of the method before, but none that an override gives, in whatever order.
    """
    for override in sorted(overrides, key=_is_of_method):
        _apply_override(raw, override)


def _is_of_method(override: str) -> bool:
    return override.startswith("distiller.") and not override.startswith("distiller.name=")


def parse_config(raw: dict[str, Any]) -> Config:
    """Validate a plain dictionary; raises `InputError` that names the first offending key.

    Loads the method's file, and torch with it, if nothing is wrong with what needs neither.
    """
    method = parse_sections(raw).distiller.name
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(explain(error, method)) from None


def parse_sections(raw: dict[str, Any]) -> Sections:
    """Validate all but the keys of the method, without torch; raises as `parse_config` does."""
    try:
        return Sections.model_validate(raw)
    except ValidationError as error:
        raise InputError(explain(error)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, such as `optimizer.lr`."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = parse_yaml(read_document(path, pipe=True))
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}; give the path of a YAML file") from None
    except DocumentError as error:
        raise InputError(f"config {path} {error}") from None
    if raw is None:
        raise InputError(f"config {path} is empty; give it keys and values, or {{}} for the defaults")
    if not isinstance(raw, dict):
        raise InputError(f"config {path} holds a {type(raw).__name__}; it must hold keys and values")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"override {shown(override)} is not of the form key=value, such as train.epochs=3")
    try:
        value = parse_yaml(text)
    except DocumentError as error:
        raise InputError(f"override {shown(override)}: the value {error}") from None
    *sections, leaf = key.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise InputError(f"override {shown(override)}: {shown(section)} is a value, not a section")
    if leaf == "name" and sections == ["distiller"] and node.get("name") != value:
        node.clear()  # another distiller's keys mean nothing to this one
    node[leaf] = value
