"""What a key may be, in words, from its JSON schema."""

from typing import Any


def allowed(schema: dict[str, Any]) -> str:
    """What a key may be, from its JSON schema; empty where that does not say it."""
    if "anyOf" in schema:
        kinds = [allowed(part) for part in schema["anyOf"] if part.get("type") != "null"]
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
            return _list(schema)
        case "object":
            return "keys and values"
    return ""


def _list(schema: dict[str, Any]) -> str:
    items = schema.get("prefixItems")
    if items is None:
        return f"a list, each {allowed(schema.get('items', {})) or 'of any kind'}"
    each = list(dict.fromkeys(allowed(item) for item in items))
    if len(each) == 1:
        return f"a list of {len(items)}, each {each[0]}"
    return f"a list of {len(items)}: {'; '.join(allowed(item) for item in items)}"


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
