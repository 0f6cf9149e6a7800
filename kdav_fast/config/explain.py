"""What is wrong with a config, in one line: the key, what was given, what is allowed."""

import difflib
import math
from functools import cache
from typing import Any

from pydantic import ValidationError, create_model

from kdav_fast.config.allowed import allowed
from kdav_fast.config.method import method_config, method_names
from kdav_fast.config.run import Sections
from kdav_fast.errors import shown

_NEAR = 0.7
_Path = tuple[str | int, ...]
"""Where a key is: `data.mean[2]` in parts."""


def explain(error: ValidationError, method: str | None = None) -> str:
    """One line for the worst of pydantic's findings: unknown keys first, as a missing one may be its right name.

    Args:
        error: of validating a config as `Sections`, or as a whole.
        method: whose keys `distiller` may have; None where no more than its name has been looked at.
    """
    found = error.errors(include_url=False)
    finding = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    path, given, schema = finding["loc"], finding["input"], _Schema(method)
    key, message = _key(path), finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "extra_forbidden":
        return _unknown(path, schema)
    if path == ("distiller", "name"):
        said = "missing" if finding["type"] == "missing" else shown(given)
        return f"distiller.name is {said}; allowed: {', '.join(map(repr, method_names()))}"
    if finding["type"] == "value_error":
        if path in (("model",), ("teacher",)):  # one class, two sections: it cannot name its own
            return f"{key}: {message}"
        return message if schema.is_section(path) else f"'{key}' is {shown(given)}; {message}"
    if finding["type"] == "missing" and not isinstance(path[-1], int):
        return f"'{key}' is missing; it must be given"
    if finding["type"] in ("missing", "too_long"):  # of a list: what counts is the whole
        path = path[:-1] if finding["type"] == "missing" else path
        return f"'{_key(path)}' is {shown(given)}; allowed: {allowed(schema.at(path)) or message}"
    return _wrong_value(path, given, message, schema)


def known_keys() -> list[str]:
    """Every key of the schema and of every method's section, dotted. Loads the methods' files, and torch with them."""
    own = (f"distiller.{key}" for fields in _fields_of_methods().values() for key in fields)
    return list(dict.fromkeys([*_Schema().keys(), *own]))


def _wrong_value(path: _Path, given: Any, message: str, root: "_Schema") -> str:
    key, schema = _key(path), root.at(path)
    if root.is_section(path):
        if given is None:
            return f"'{key}' is empty; give it keys, or leave it out"
        hint = (
            f"; perhaps {key}.name is meant" if "name" in root.fields(path) and isinstance(given, str) else ""
        )
        return f"'{key}' is {shown(given)}, but it is a section, which holds keys and values{hint}"
    choice = allowed(schema) or message[0].lower() + message[1:]
    said, hint = "empty" if given is None else shown(given), ""
    if isinstance(given, str) and _is_number(schema):
        said += ", which is text"
    elif isinstance(given, float) and not math.isfinite(given):
        hint = ", finite"
    elif isinstance(given, float) and given.is_integer() and _is_whole(schema):
        hint = ", written without a point or an exponent"
    elif schema.get("type") == "string" and isinstance(given, int | float):
        hint = ", in quotes if it looks like a number or like yes or no"
    if not isinstance(given, str) and (why := _why(schema)):
        hint += f" ({why})"
    return f"'{key}' is {said}; allowed: {choice}{hint}"


def _why(schema: dict[str, Any]) -> str:
    """The reason of a number's bounds, where one is known."""
    return next((part["why"] for part in schema.get("anyOf", [schema]) if "why" in part), "")


def _is_number(schema: dict[str, Any]) -> bool:
    return any(part.get("type") in ("integer", "number") for part in schema.get("anyOf", [schema]))


def _is_whole(schema: dict[str, Any]) -> bool:
    kinds = [part.get("type") for part in schema.get("anyOf", [schema])]
    return "integer" in kinds and "number" not in kinds


def _unknown(path: _Path, schema: "_Schema") -> str:
    """An unknown key, and the known one that it may stand for, or else what its section may hold."""
    key, section, leaf = _key(path), path[:-1], str(path[-1])
    prefix = f"{_key(section)}." if section else ""
    said = f"unknown key {shown(key)}"
    if section == ("distiller",):
        said += f" with distiller.name '{schema.method}'"
        if owners := [repr(name) for name, fields in _fields_of_methods().items() if leaf in fields]:
            return f"{said}; it goes with {' and '.join(owners)}"
    beside = schema.fields(section)
    nearest = difflib.get_close_matches(leaf, beside, n=1, cutoff=_NEAR)
    if nearest:
        return f"{said}; the nearest known one is '{prefix}{nearest[0]}'"
    if leaf != "name":
        for keys in (_Schema().keys, known_keys):  # the methods' own come last: they take loading torch
            if elsewhere := _elsewhere(leaf, keys(), misspelt=not section):
                return f"{said}; perhaps {' or '.join(elsewhere[:3])}"
    return f"{said}; allowed{' in ' + prefix[:-1] if section else ''}: {', '.join(beside)}"


def _elsewhere(leaf: str, keys: list[str], misspelt: bool) -> list[str]:
    """The keys of any section that are called so, or nearly so where the key may be `misspelt`."""
    leaves = [key.rpartition(".")[2] for key in keys]
    if misspelt and leaf not in leaves:
        leaf = next(iter(difflib.get_close_matches(leaf, sorted(set(leaves)), n=1, cutoff=_NEAR)), leaf)
    return [key for key, name in zip(keys, leaves, strict=True) if name == leaf]


class _Schema:
    """The JSON schema of a config: with the keys of a method, or without any method's."""

    def __init__(self, method: str | None = None) -> None:
        self.method, self._root = method, _json_schema(method)

    def at(self, path: _Path) -> dict[str, Any]:
        """Schema of a key; empty where there is none."""
        schema = self._root
        for part in path:
            if isinstance(part, int):
                parts = [one for one in schema.get("anyOf", [schema]) if one.get("type") == "array"] or [{}]
                items = parts[0].get("prefixItems")
                schema = items[part] if items and part < len(items) else parts[0].get("items", {})
            else:
                schema = self._resolved(schema.get("properties", {}).get(part, {}))
        return schema

    def is_section(self, path: _Path) -> bool:
        return "properties" in self.at(path)

    def fields(self, path: _Path) -> list[str]:
        """What a section may hold."""
        return list(self.at(path).get("properties", ()))

    def keys(self) -> list[str]:
        """Every key, dotted."""
        sections = self.fields(())
        return sections + [f"{section}.{name}" for section in sections for name in self.fields((section,))]

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Behind references, and a section that may be null."""
        if "anyOf" in schema and any("$ref" in part for part in schema["anyOf"]):
            schema = next(part for part in schema["anyOf"] if "$ref" in part)
        return self._root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


@cache
def _json_schema(method: str | None) -> dict[str, Any]:
    if method is None:
        return Sections.model_json_schema()
    whole = create_model("Whole", __base__=Sections, distiller=(method_config(method), ...))
    return whole.model_json_schema()


def _fields_of_methods() -> dict[str, list[str]]:
    """Name of each method -> the keys of its section."""
    return {name: list(method_config(name).model_fields) for name in method_names()}


def _key(path: _Path) -> str:
    """As in the config, items of a list counted from 0: `data.mean[2]`."""
    key = ""
    for part in path:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")
