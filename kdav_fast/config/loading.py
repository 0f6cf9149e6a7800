"""From YAML and `key=value` overrides to a validated config, and back."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdav_fast.config.data import DataConfig
from kdav_fast.config.distiller import KDAVConfig, KDConfig, NoDistiller, SimKDConfig
from kdav_fast.config.network import ModelConfig, TeacherConfig
from kdav_fast.config.run import Config
from kdav_fast.config.training import OptimizerConfig, ScheduleConfig, TrainConfig
from kdav_fast.errors import InputError


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number: YAML 1.1 wants 1.0e-3 and reads the former as text."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and validate.

    Args:
        path: YAML file; `None` starts from the defaults.
        overrides: dotted keys with YAML values, such as `train.epochs=3` or `data.mean=[0.5,0.5,0.5]`.

    Raises:
        InputError: the file cannot be read, or a key or value is not in the schema.
    """
    raw = _read_yaml(path) if path else {}
    apply_overrides(raw, overrides)
    return parse_config(raw)


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> None:
    """Set `key=value` overrides in a plain dictionary; raises `InputError` for one that is not of that form."""
    for override in overrides:
        _apply_override(raw, override)


def parse_config(raw: dict[str, Any]) -> Config:
    """Validate a plain dictionary; raises `InputError` that names the first offending key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(_explain(error.errors()[0], raw)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"config {path} holds a {type(raw).__name__}; it must hold keys and values")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override '{override}' is not of the form key=value, such as train.epochs=3")
    try:
        value = yaml.load(text, _YamlLoader)
    except yaml.YAMLError:
        raise InputError(f"override '{override}': the value is not valid YAML") from None
    *sections, leaf = key.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise InputError(f"override '{override}': '{section}' is a value, not a section")
    if leaf == "name" and sections == ["distiller"] and node.get("name") != value:
        node.clear()  # another distiller's keys mean nothing to this one
    node[leaf] = value


_SECTIONS = {
    "data": [DataConfig],
    "model": [ModelConfig],
    "teacher": [TeacherConfig],
    "distiller": [NoDistiller, KDConfig, KDAVConfig, SimKDConfig],
    "optimizer": [OptimizerConfig],
    "schedule": [ScheduleConfig],
    "train": [TrainConfig],
}
_DISTILLERS = {model.model_fields["name"].annotation.__args__[0]: model for model in _SECTIONS["distiller"]}


def _known_keys() -> list[str]:
    keys = list(Config.model_fields)
    for section, models in _SECTIONS.items():
        keys += [f"{section}.{field}" for model in models for field in model.model_fields]
    return keys


def _explain(error: dict[str, Any], raw: dict[str, Any]) -> str:
    """One line for pydantic's first finding: the key, what was given, what is allowed."""
    # A discriminated union puts the chosen member's tag into the location; the user's key has no such part.
    location = [str(part) for part in error["loc"]]
    if len(location) > 1 and location[0] == "distiller" and location[1] in _DISTILLERS:
        del location[1]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        allowed = _known_keys()
        if location[0] == "distiller" and isinstance(raw.get("distiller"), dict):
            chosen = raw["distiller"].get("name", "none")
            allowed = [f"distiller.{field}" for field in _DISTILLERS[chosen].model_fields]
        near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.0)[0]
        return f"unknown key '{key}'; the nearest known one is '{near}'"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key in ("model", "teacher") else message
    if error["type"] == "missing":
        return f"'{key}' is missing; it must be given"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = error["input"].get("name") if isinstance(error["input"], dict) else error["input"]
        return f"distiller.name is {given!r}; allowed: {', '.join(map(repr, _DISTILLERS))}"
    return f"'{key}' is {error['input']!r}: {message[0].lower()}{message[1:]}"
