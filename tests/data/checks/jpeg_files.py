"""JPEG files, sound and damaged in known places."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.data.pictures import smooth_photograph


def photograph(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """H x W x 3: waves with the noise of a sensor, so that its codes are as dense as a photograph's."""
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return (smooth_photograph(height, width, seed) + noise).clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


def data_start(content: bytes) -> int:
    """Where the codes of a JPEG without thumbnail begin."""
    scan = content.index(b"\xff\xda")
    return scan + 2 + int.from_bytes(content[scan + 2 : scan + 4], "big")


def _overwritten(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def damaged(kind: str, count: int = 20) -> Iterator[bytes]:
    """Files of one kind of damage, in places drawn at random."""
    random = np.random.default_rng(7)
    for seed in range(count):
        sound = jpeg(photograph(seed))
        first, last = data_start(sound), len(sound) - 2
        at = int(random.integers(first, last - 600))
        match kind:
            case "cut in half, end mark added":
                yield sound[: len(sound) // 2] + sound[-2:]
            case "cut anywhere, end mark added":
                yield sound[:at] + sound[-2:]
            case "second half zeroed":
                yield _overwritten(sound, len(sound) // 2, bytes(len(sound) - len(sound) // 2))
            case "second half zeroed but for the end mark":
                yield _overwritten(sound, len(sound) // 2, bytes(last - len(sound) // 2))
            case "64 bytes zeroed" | "512 bytes zeroed":
                yield _overwritten(sound, at, bytes(int(kind.split()[0])))
            case "512 random bytes":
                yield _overwritten(sound, at, random.bytes(512))
            case "512 bytes lost":
                yield sound[:at] + sound[at + 512 :]
            case _:  # "N bits flipped"
                content = bytearray(sound)
                for place in random.integers(first, last, int(kind.split()[0])):
                    content[place] ^= 1 << int(random.integers(8))
                yield bytes(content)
