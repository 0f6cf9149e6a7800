"""Reads the machine code that `cuobjdump -sass` prints: loads by width, matrix instructions by shape, loops."""

import re
from collections import Counter
from typing import NamedTuple

# Matrix units' instructions: Ampere's (HMMA, IMMA), Hopper's (HGMMA), Blackwell's (UTCHMMA and its kin).
MATRIX = re.compile(r"(?:[HIDQ]G?MMA|UTC\w*MMA)\b")
LOAD = re.compile(r"(LDG|LDGSTS)\.")
LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    opcode: str
    """With its modifiers, such as LDG.E.128."""
    target: int | None
    """Where a branch goes."""


class Report(NamedTuple):
    """What a kernel's machine code does."""

    loads: dict[str, int]
    """Loads from global memory by kind and bits: LDG.128, LDGSTS.128, UTMALDG."""
    matrix: dict[str, int]
    """Matrix instructions with their shapes: HGMMA.64x256x16, HMMA.16816."""
    narrow: int
    """Loads of fewer than 64 bits outside every loop."""
    narrow_in_loops: int


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel, in order."""
    found = []
    for match in LINE.finditer(text):
        branch = re.search(r"\b0x([0-9a-f]+)", match["rest"]) if match["opcode"].startswith("BRA") else None
        found.append(
            Instruction(int(match["address"], 16), match["opcode"], int(branch[1], 16) if branch else None)
        )
    return found


def report(text: str) -> Report:
    """Counts over the kernel in `text`.

    A loop is what a branch back jumps over; the branch to itself that ends every kernel is none.
    """
    code = parse(text)
    loops = [(one.target, one.address) for one in code if one.target is not None and one.target < one.address]
    loads: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    narrow = narrow_in_loops = 0
    for one in code:
        if load := LOAD.match(one.opcode):
            bits = _bits(one.opcode)
            loads[f"{load[1]}.{bits}"] += 1
            inside = any(start <= one.address <= end for start, end in loops)
            narrow += bits < 64 and not inside
            narrow_in_loops += bits < 64 and inside
        elif one.opcode.startswith("UTMALDG"):
            loads["UTMALDG"] += 1
        elif MATRIX.match(one.opcode):
            kind, *modifiers = one.opcode.split(".")
            shape = next((f".{part}" for part in modifiers if re.fullmatch(r"\d+(x\d+)*", part)), "")
            matrix[kind + shape] += 1
    return Report(dict(sorted(loads.items())), dict(sorted(matrix.items())), narrow, narrow_in_loops)


def _bits(opcode: str) -> int:
    """Of one thread's share of a load."""
    for part in opcode.split("."):
        if part in ("64", "128", "256"):
            return int(part)
        if re.fullmatch(r"[US](8|16)", part):
            return int(part[1:])
    return 32
