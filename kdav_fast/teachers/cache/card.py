"""What a cache is of: a file beside its shards, written before them, which decides their content."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_validator

from kdav_fast.checkpoint.manifest import manifest_bytes, unsealed
from kdav_fast.config.section import Section
from kdav_fast.data.fingerprint import difference
from kdav_fast.errors import InputError, listed, shown
from kdav_fast.runtime.files import write_whole
from kdav_fast.teachers.cache.layout import Layout

FILE_NAME = "cache.json"
_MOST_NAMED = 6


class CacheCard(Section):
    """Everything that decides a cache's content. Two caches of equal cards are equal byte for byte."""

    format: Literal[1] = 1
    layout: Layout
    facts: dict[str, Any]
    """JSON values by name: what was asked what, such as the teacher's checksum, its normalisation, the seed of the
    views. Of these, `data` is a fingerprint (`kdav_fast.data.fingerprint`)."""

    @field_validator("facts")
    @classmethod
    def _plain(cls, facts: dict[str, Any]) -> dict[str, Any]:
        """What is written is what is read, and no fact hides what the layout says."""
        for name in facts.keys() & Layout.model_fields.keys():
            raise ValueError(f"the fact {name!r} is named as a key of the layout; give it another name")
        for name, value in facts.items():
            _require_json(value, name)
        return facts

    @cached_property
    def content(self) -> bytes:
        """The file, with a checksum of its own."""
        values = {"format": self.format, "layout": self.layout.model_dump(), "facts": self.facts}
        return manifest_bytes(json.loads(json.dumps(values, sort_keys=True)))

    @cached_property
    def name(self) -> str:
        """By which every shard says which cache it is of."""
        return hashlib.sha256(self.content).hexdigest()

    def require(self, folder: Path, facts: Mapping[str, Any], **layout: int) -> None:
        """Make sure that the cache is of what a run is.

        Args:
            folder: of the cache, for the message.
            facts: all that a cache of this run would have.
            **layout: what the run needs of the layout, such as `images`, `views`, `classes`, `width`.

        Raises:
            InputError: which names all that differs, as it is there and here.
        """
        for key in layout.keys() - Layout.model_fields.keys():
            raise TypeError(f"{key!r} is no key of the layout; allowed: {', '.join(Layout.model_fields)}")
        there = {key: getattr(self.layout, key) for key in layout} | self.facts
        found = list(differences(there, json.loads(json.dumps({**layout, **facts}))))
        if found:
            raise InputError(
                f"the teacher's cache {folder} is of something else than this run: {listed(found, _MOST_NAMED, '; ')}; "
                "give this run what the cache was made with, or a cache of its own"
            )


def write_card(folder: Path, card: CacheCard) -> None:
    """Makes the folder. A crash leaves the old card or the new one; raises `OSError`."""
    write_whole(folder / FILE_NAME, card.content)


def read_card(folder: Path) -> CacheCard:
    """The card of a cache.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    card, problem = found_card(folder)
    if card is None:
        raise InputError(
            f"{folder} is no teacher's cache: {problem}; give the folder of one, or restore that file from a copy"
        )
    return card


def found_card(folder: Path) -> tuple[CacheCard | None, str | None]:
    """The card of a cache, or what is wrong with it."""
    try:
        values = unsealed((folder / FILE_NAME).read_text(encoding="utf-8"))
        if values is None:
            return None, f"{FILE_NAME} has other content than was written"
        if values["format"] != 1:
            return (
                None,
                f"{FILE_NAME} is of format {shown(values['format'])}, and this version reads format 1",
            )
        return CacheCard.model_validate(values), None
    except OSError as error:
        return None, f"{FILE_NAME}: {error.strerror}"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return None, f"{FILE_NAME}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, f"{FILE_NAME} is not the card of a cache"


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two sets of facts, by dotted name, as it is there and here."""
    for key in sorted(there.keys() | here.keys()):
        name, one, other = prefix + key, there.get(key, _ABSENT), here.get(key, _ABSENT)
        if one == other and type(one) is type(other):
            continue
        if name == "data" and isinstance(one, dict) and isinstance(other, dict):
            yield f"the data: {difference(one, other)}"
        elif isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{name}.")
        else:
            yield f"{name} is {_value(one)} there and {_value(other)} here"


def _require_json(value: object, name: str) -> None:
    """Raise `ValueError` for what would be another value, or none, once it has been a file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the fact {name} has the key {shown(key)}; keys must be text")
            _require_json(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _require_json(inner, f"{name}.{number}")
    elif not (value is None or isinstance(value, str | bool | int)) and not (
        isinstance(value, float) and math.isfinite(value)
    ):
        raise ValueError(
            f"the fact {name} is {shown(value)}; give text, finite numbers, lists of them or names"
        )


class _Absent:
    pass


_ABSENT = _Absent()


def _value(value: object) -> str:
    return "not given" if value is _ABSENT else shown(value)
