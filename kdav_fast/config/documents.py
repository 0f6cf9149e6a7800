"""YAML and JSON as people write them: one document of plain values, of bounded size, in which nothing is said twice."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from kdav_fast.errors import shown

MAX_BYTES = 1 << 18
MAX_VALUES = 10_000
"""In a document, with every alias written out: a few lines of aliases to aliases can stand for billions."""
_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_PLAIN = {_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map")}


_CLEARER = {
    r"'\t'": "a tab where YAML takes none; indent with spaces",
    "another document": "a second document begins; give one",
    "<block end>": "this does not continue what stands above it; mind the indentation",
    "<stream end>": "the text ends too early; close what was opened",
}
"""Words in the parser's message -> what it means."""


class DocumentError(ValueError):
    """What is wrong with a document, in words that end a sentence about it."""


class _Loader(yaml.SafeLoader):
    """YAML's plain values without its traps.

    1e-3 is a number, which YAML 1.1 takes for text. Text are 1:30 and 010, which it takes for 90 and 8, and dates.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as its base class has it


for _name, _pattern, _first in (
    (
        "bool",
        r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$",
        "yYnNtTfFoO",
    ),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.?|[0-9][0-9_]*\.[0-9_]+|\.[0-9]+)[eE][-+]?[0-9]+"
        r"|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    ),
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))


def read_document(path: Path, *, pipe: bool = False) -> str:
    """A file's text, with or without a byte order mark.

    Args:
        path: the file.
        pipe: whether it may be a pipe, which is waited for and can be read once only.

    Raises:
        DocumentError: it is a pipe or a device, larger than `MAX_BYTES`, or not UTF-8.
        OSError: it cannot be read.
    """
    if not (pipe or path.is_file() or path.is_dir()) and path.exists():
        raise DocumentError("is a pipe or a device; give a file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DocumentError(f"is larger than {MAX_BYTES >> 10} KiB; give a smaller one")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DocumentError("is not text in UTF-8; save it as UTF-8") from None


def parse_yaml(text: str) -> Any:
    """The plain value that YAML text stands for.

    Raises:
        DocumentError: it is not YAML, holds other than plain values or more than `MAX_VALUES` of them, or gives a key
            twice.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _Check(loader).node(root)
        return _unshared(loader.construct_document(root))
    except yaml.MarkedYAMLError as error:
        raise DocumentError(f"is not valid YAML: {_marked(error)}") from None
    except yaml.reader.ReaderError as error:
        raise DocumentError(f"is not valid YAML: it holds the character {_code(error.character)}") from None
    except RecursionError:
        raise DocumentError("is nested too deeply; a few levels are enough") from None


def parse_json(text: str) -> Any:
    """The plain value that JSON text stands for.

    Raises:
        DocumentError: it is not JSON, holds a number that is not finite, or gives a key twice.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unrepeated, parse_constant=_refuse_constant, parse_float=_finite
        )
    except DocumentError:
        raise
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg[0].lower()}{error.msg[1:]}"
        ) from None
    except ValueError:  # Python reads no whole number of thousands of digits
        raise DocumentError("is not valid JSON: it holds a number of too many digits") from None
    except RecursionError:
        raise DocumentError("is nested too deeply; a few levels are enough") from None


def written(value: Any) -> str:
    """A plain value on one line of YAML, as an override takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


class _Check:
    """One walk over a document's nodes, each looked at once however often it is referred to."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._values: dict[int, int] = {}  # of the nodes done, how many values they stand for
        self._within: set[int] = set()

    def node(self, node: yaml.Node, where: str = "") -> int:
        """How many values a node stands for, itself included."""
        known = self._values.get(id(node))
        if known is not None:
            return known
        if id(node) in self._within:
            raise DocumentError(f"is not valid: the alias in line {_line(node)} refers to what it stands in")
        if node.tag not in _PLAIN:
            tag = node.tag.replace(_TAG, "!!")
            raise DocumentError(
                f"is not valid: line {_line(node)} has the tag {shown(tag)}; give plain values"
            )
        self._within.add(id(node))
        count = 1
        if isinstance(node, yaml.ScalarNode):
            self._require_value(node)
        elif isinstance(node, yaml.MappingNode):
            self._require_keys(node, where)
            for key, value in node.value:
                count += self.node(value, f"{where}{key.value}.")
        else:
            for number, value in enumerate(node.value):
                count += self.node(value, f"{where}{number}.")
        if count > MAX_VALUES:
            raise DocumentError(
                f"stands for more than {MAX_VALUES} values; give fewer, without aliases to aliases"
            )
        self._within.remove(id(node))
        self._values[id(node)] = count
        return count

    def _require_value(self, node: yaml.ScalarNode) -> None:
        try:
            self._loader.construct_object(node)
        except (
            ValueError,
            KeyError,
        ):  # an explicit tag that does not fit, or a number of thousands of digits
            kind = node.tag.replace(_TAG, "")
            raise DocumentError(
                f"is not valid YAML: {shown(node.value)} in line {_line(node)} is no {kind}"
            ) from None

    @staticmethod
    def _require_keys(node: yaml.MappingNode, where: str) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise DocumentError(f"is not valid: the key in line {_line(key)} is no name")
            if key.tag not in (_TAG + "str", _MERGE):
                raise DocumentError(
                    f"is not valid: the key {shown(key.value)} in line {_line(key)} is not text to YAML; keys are names"
                )
            if key.value in seen:
                lines = " and ".join(map(str, sorted({seen[key.value], _line(key)})))
                raise DocumentError(f"gives {shown(where + key.value)} twice, in line {lines}; keep one")
            seen[key.value] = _line(key)


def _unshared(value: Any) -> Any:
    """Aliases give one list or dictionary several places; a change in one must not show in the others."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _code(character: int | str) -> str:
    return f"U+{character if isinstance(character, int) else ord(character):04X}"


def _marked(error: yaml.MarkedYAMLError) -> str:
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
    problem = next((clear for jargon, clear in _CLEARER.items() if jargon in problem), problem)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DocumentError(f"gives {shown(twice)} twice; keep one")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise DocumentError(f"is not valid JSON: it holds {name}, which is no number there")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise DocumentError(f"holds {shown(text)}, which is too large a number")
    return value
