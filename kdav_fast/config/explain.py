"""What is wrong with a config, in one line: the key, what was given, what is allowed."""

import difflib
import math
from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import ValidationError

from kdav_fast.config.run import Config
from kdav_fast.errors import shown

_NEAR = 0.7


def explain(error: ValidationError, raw: dict[str, Any]) -> str:
    """One line for the worst of pydantic's findings: unknown keys first, as a missing one may be its right name.

    Args:
        error: of validating `raw` as a `Config`.
        raw: what was validated.
    """
    found = error.errors(include_url=False)
    finding = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    path = _without_tag(finding["loc"])
    key, message = _key(path), finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "extra_forbidden":
        return _unknown(path, raw)
    if finding["type"] == "value_error":
        if len(path) == 1 and path[0] in (
            "model",
            "teacher",
        ):  # one class, two sections: it cannot name its own
            return f"{key}: {message}"
        return message if _is_section(path) else f"'{key}' is {shown(finding['input'])}; {message}"
    if finding["type"] == "missing" and not isinstance(path[-1], int):
        return f"'{key}' is missing; it must be given"
    if finding["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = _distiller(raw)
        said = "missing" if given is None else shown(given)
        return f"distiller.name is {said}; allowed: {', '.join(map(repr, _distillers()))}"
    if finding["type"] in ("missing", "too_long"):  # of a list: what counts is the whole
        path, given = (path[:-1] if finding["type"] == "missing" else path), finding["input"]
        return f"'{_key(path)}' is {shown(given)}; allowed: {_allowed(_schema(path)) or message}"
    return _wrong_value(path, finding["input"], message)


def _wrong_value(path: list[str | int], given: Any, message: str) -> str:
    key, schema = _key(path), _schema(path)
    if _is_section(path):
        if given is None:
            return f"'{key}' is empty; give it keys, or leave it out"
        hint = f"; perhaps {key}.name is meant" if "name" in _fields(path) and isinstance(given, str) else ""
        return f"'{key}' is {shown(given)}, but it is a section, which holds keys and values{hint}"
    allowed = _allowed(schema) or message[0].lower() + message[1:]
    said, hint = "empty" if given is None else shown(given), ""
    if isinstance(given, str) and _is_number(schema):
        said += ", which is text"
    elif isinstance(given, float) and not math.isfinite(given):
        hint = ", finite"
    elif isinstance(given, float) and given.is_integer() and _is_number(schema):
        hint = ", written without a point or an exponent"
    elif schema.get("type") == "string" and isinstance(given, int | float):
        hint = ", in quotes if it looks like a number or like yes or no"
    return f"'{key}' is {said}; allowed: {allowed}{hint}"


def _is_number(schema: dict[str, Any]) -> bool:
    return any(part.get("type") in ("integer", "number") for part in schema.get("anyOf", [schema]))


def _unknown(path: list[str | int], raw: dict[str, Any]) -> str:
    """An unknown key, and the known one that it may stand for, or else what its section may hold."""
    key, section, leaf = _key(path), path[:-1], str(path[-1])
    beside = _distiller_fields(raw) if section == ["distiller"] else _fields(section)
    prefix = f"{_key(section)}." if section else ""
    where = f" with distiller.name {shown(_distiller(raw))}" if section == ["distiller"] else ""
    owners = [repr(name) for name, fields in _distillers().items() if leaf in fields]
    if section == ["distiller"] and owners:
        return f"unknown key {shown(key)}{where}; it goes with {' and '.join(owners)}"
    nearest = difflib.get_close_matches(leaf, beside, n=1, cutoff=_NEAR)
    if nearest:
        return f"unknown key {shown(key)}{where}; the nearest known one is '{prefix}{nearest[0]}'"
    elsewhere = [one for one in known_keys() if one.rpartition(".")[2] == leaf and one != key]
    if not elsewhere and not section:  # a misspelt key without its section
        names = {one.rpartition(".")[2] for one in known_keys()}
        close = difflib.get_close_matches(leaf, sorted(names), n=1, cutoff=_NEAR)
        elsewhere = [one for one in known_keys() if close and one.rpartition(".")[2] == close[0]]
    if elsewhere and leaf != "name":
        return f"unknown key {shown(key)}{where}; perhaps {' or '.join(elsewhere[:3])}"
    return f"unknown key {shown(key)}{where}; allowed{' in ' + prefix[:-1] if section else ''}: {', '.join(beside)}"


def _allowed(schema: dict[str, Any]) -> str:
    """What a key may be, from its JSON schema; empty where that does not say it."""
    if "anyOf" in schema:
        kinds = [_allowed(part) for part in schema["anyOf"] if part.get("type") != "null"]
        null = ["null"] * (len(kinds) < len(schema["anyOf"]))
        return " or ".join(null + kinds) if all(kinds) else ""
    if "enum" in schema or "const" in schema:
        return ", ".join(map(repr, schema.get("enum", [schema.get("const")])))
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "string":
            return "a path" if schema.get("format") == "path" else "text"
        case "array":
            return _allowed_list(schema)
        case "object":
            return "keys and values"
    return ""


def _allowed_list(schema: dict[str, Any]) -> str:
    items = schema.get("prefixItems")
    if items is None:
        return f"a list, each {_allowed(schema.get('items', {})) or 'of any kind'}"
    each = list(dict.fromkeys(_allowed(item) for item in items))
    if len(each) == 1:
        return f"a list of {len(items)}, each {each[0]}"
    return f"a list of {len(items)}: {'; '.join(_allowed(item) for item in items)}"


def _bounds(schema: dict[str, Any]) -> str:
    words = {
        "exclusiveMinimum": "above",
        "minimum": "of at least",
        "exclusiveMaximum": "below",
        "maximum": "of at most",
    }
    said = [
        f"{word} {schema[bound]:g}" if isinstance(schema[bound], float) else f"{word} {schema[bound]}"
        for bound, word in words.items()
        if bound in schema
    ]
    return f" {' and '.join(said)}" if said else ""


@cache
def _root() -> dict[str, Any]:
    return Config.model_json_schema()


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """Behind references, and a section that may be null."""
    if "anyOf" in schema and any("$ref" in part for part in schema["anyOf"]):
        schema = next(part for part in schema["anyOf"] if "$ref" in part)
    return _root()["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _schema(path: Iterable[str | int]) -> dict[str, Any]:
    """JSON schema of a key; empty where there is none."""
    schema = _root()
    for part in path:
        if "oneOf" in schema:
            schema = next(
                (member for member in map(_resolved, schema["oneOf"]) if part in member["properties"]), {}
            )
        if isinstance(part, int):
            parts = [one for one in schema.get("anyOf", [schema]) if one.get("type") == "array"] or [{}]
            items = parts[0].get("prefixItems")
            schema = items[part] if items and part < len(items) else parts[0].get("items", {})
        else:
            schema = _resolved(schema.get("properties", {}).get(part, {}))
    return schema


def _is_section(path: list[str | int]) -> bool:
    schema = _schema(path)
    return "properties" in schema or "oneOf" in schema


def _fields(path: list[str | int]) -> list[str]:
    schema = _schema(path)
    members = map(_resolved, schema["oneOf"]) if "oneOf" in schema else [schema]
    return list(dict.fromkeys(name for member in members for name in member.get("properties", ())))


@cache
def known_keys() -> list[str]:
    """Every key of the schema, dotted."""
    keys = list(Config.model_fields)
    for section in Config.model_fields:
        keys += [f"{section}.{name}" for name in _fields([section])] if _is_section([section]) else []
    return keys


@cache
def _distillers() -> dict[str, list[str]]:
    """Name -> its keys."""
    members = [_resolved(member)["properties"] for member in _root()["properties"]["distiller"]["oneOf"]]
    return {fields["name"]["const"]: list(fields) for fields in members}


def _distiller(raw: dict[str, Any]) -> Any:
    section = raw.get("distiller")
    return section.get("name") if isinstance(section, dict) else None


def _distiller_fields(raw: dict[str, Any]) -> list[str]:
    name = _distiller(raw)
    return _distillers().get(name, ["name"]) if isinstance(name, str) else ["name"]


def _without_tag(location: tuple[str | int, ...]) -> list[str | int]:
    """A discriminated union puts the chosen member's tag into the location; the user's key has no such part."""
    path = list(location)
    if len(path) > 1 and path[0] == "distiller" and path[1] in _distillers():
        del path[1]
    return path


def _key(path: Iterable[str | int]) -> str:
    """As in the config, items of a list counted from 0: `data.mean[2]`."""
    key = ""
    for part in path:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")
