"""What a key is marked as."""

from typing import Annotated

from pydantic import Field

from kdav_fast.config.section import Count, Mark, MayChange, OfMachine, Section, keys_marked


class Inner(Section):
    threads: OfMachine[Annotated[int, Field(ge=1)] | None] = None
    folder: MayChange[str] = "here"
    seed: int = 0


class Outer(Section):
    inner: Inner = Inner()
    other: Inner | None = None
    patience: MayChange[Count] = 3


def test_marked_keys_are_found_in_sections_within_sections():
    keys = {"inner.threads", "inner.folder", "patience"}
    assert keys_marked(Mark.MAY_CHANGE, Outer()) == keys
    assert keys_marked(Mark.MAY_CHANGE, Outer(other=Inner())) == keys | {"other.threads", "other.folder"}
    assert keys_marked(Mark.OF_MACHINE, Outer()) == {"inner.threads"}
