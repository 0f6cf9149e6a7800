"""Which damage to a JPEG the check before a run finds, which Pillow finds, and which could be seen but nobody finds.

    python benchmarks/damaged_images.py --root FOLDER [--progressive] [--repeats N] [--json FILE]

Takes every JPEG below FOLDER, damages copies of it in memory in each of several ways at random places of its codes, and
asks. The share of damaged files found is printed and written; sound files that are refused are counted too.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from command_line import RESULT_FOLDER, Parser, positive
from environment import describe
from PIL import Image
from tqdm import tqdm

from kdav_fast.data.checks.defects import image_defect
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole

VISIBLE_LEVELS, VISIBLE_SHARE = 16, 0.01
"""Damage that is not found counts as visible where more than this share of pixels changed by more levels than that."""
END = b"\xff\xd9"
START_OF_SCAN = 0xDA
Damage = Callable[[bytearray, int, np.random.Generator], bytearray]


def zeroed(size: int, multiple: int = 1) -> Damage:
    def damage(content: bytearray, start: int, random: np.random.Generator) -> bytearray:
        at = _place(content, start, size, random, multiple)
        content[at : at + size] = bytes(size)
        return content

    return damage


def randomised(size: int) -> Damage:
    def damage(content: bytearray, start: int, random: np.random.Generator) -> bytearray:
        at = _place(content, start, size, random)
        content[at : at + size] = random.bytes(size)
        return content

    return damage


def lost(size: int) -> Damage:
    def damage(content: bytearray, start: int, random: np.random.Generator) -> bytearray:
        at = _place(content, start, size, random)
        del content[at : at + size]
        return content

    return damage


def flipped(bits: int) -> Damage:
    def damage(content: bytearray, start: int, random: np.random.Generator) -> bytearray:
        for at in random.integers(start, len(content) - len(END), bits):
            content[at] ^= 1 << random.integers(8)
        return content

    return damage


def cut(content: bytearray, start: int, random: np.random.Generator) -> bytearray:
    return content[: random.integers(start + 1, len(content) - len(END))] + END


def half_cut(content: bytearray, start: int, random: np.random.Generator) -> bytearray:
    return content[: (start + len(content)) // 2] + END


def half_zeroed(content: bytearray, start: int, random: np.random.Generator) -> bytearray:
    half = (start + len(content)) // 2
    return content[:half] + bytes(len(content) - half - len(END)) + END


DAMAGES: dict[str, Damage] = {
    "cut in half and an end mark added": half_cut,
    "cut anywhere and an end mark added": cut,
    "second half zeroed but for the end mark": half_zeroed,
    "4,096 bytes zeroed, at a multiple of 4,096": zeroed(4096, 4096),
    "512 bytes zeroed, at a multiple of 512": zeroed(512, 512),
    "64 bytes zeroed": zeroed(64),
    "16 bytes zeroed": zeroed(16),
    "4,096 bytes random": randomised(4096),
    "512 bytes random": randomised(512),
    "512 bytes lost": lost(512),
    "20 bits flipped": flipped(20),
    "3 bits flipped": flipped(3),
    "1 bit flipped": flipped(1),
}


def _place(content: bytearray, start: int, size: int, random: np.random.Generator, multiple: int = 1) -> int:
    """Where a damage of that size begins, inside the codes.

    Raises:
        ValueError: there is no room.
    """
    first, last = -(-start // multiple), (len(content) - len(END) - size) // multiple
    return multiple * int(random.integers(first, last + 1))


def codes_start(content: bytes) -> int:
    """Where the codes of a file's first scan begin; those of a thumbnail inside a header do not count."""
    position = 2
    while content[position + 1] != START_OF_SCAN:
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")


def measure(images: list[bytes], repeats: int, seed: int) -> Iterator[dict[str, object]]:
    """A row a kind of damage."""
    for name, damage in DAMAGES.items():
        random = np.random.default_rng([seed, *name.encode()])
        files = found = by_pillow = visible = 0
        for image in tqdm(images, name, leave=False, disable=None):
            for _ in range(repeats):
                try:
                    damaged = bytes(damage(bytearray(image), codes_start(image), random))
                except ValueError:
                    continue  # too small for this damage
                if damaged == image:
                    continue
                files += 1
                by_pillow += _pixels(damaged) is None
                if image_defect(io.BytesIO(damaged), decode=True):
                    found += 1
                else:
                    visible += _looks_otherwise(image, damaged)
        if files:
            yield {
                "damage": name,
                "files": files,
                "found": found / files,
                "found_by_pillow": by_pillow / files,
                "visible_not_found": visible / files,
            }


def _pixels(content: bytes) -> np.ndarray | None:
    """None where Pillow refuses the file."""
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.int16)
    except Exception:  # its plugins raise whatever they stumble over
        return None


def _looks_otherwise(sound: bytes, damaged: bytes) -> bool:
    before, after = _pixels(sound), _pixels(damaged)
    if after is None or before.shape != after.shape:
        return True
    return bool((np.abs(before - after).max(2) > VISIBLE_LEVELS).mean() > VISIBLE_SHARE)


def read_images(root: Path, progressive: bool) -> list[bytes]:
    """The content of all JPEG files below a folder, or the same pictures as progressive files."""
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    images = [content for path in paths if (content := path.read_bytes()).startswith(b"\xff\xd8\xff")]
    if not images:
        raise InputError(f"--root {root} holds no JPEG files; give a folder of sound photographs")
    return [_progressive(image) for image in images] if progressive else images


def _progressive(image: bytes) -> bytes:
    content = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(content, "JPEG", quality=90, progressive=True)
    return content.getvalue()


def run(options: argparse.Namespace) -> None:
    images = read_images(options.root, options.progressive)
    refused = sum(image_defect(io.BytesIO(image), decode=True) is not None for image in images)
    rows = list(measure(images, options.repeats, options.seed))
    result = {
        "environment": describe(torch.device("cpu"), ("simplejpeg", "pillow", "numpy")),
        "images": len(images),
        "progressive": options.progressive,
        "sound_images_refused": refused,
        "rows": rows,
    }
    write_whole(options.json, json.dumps(result, indent=1) + "\n")
    print("| damage | files | found % | by Pillow % | visible, not found % |\n|---|---:|---:|---:|---:|")
    for row in rows:
        shares = (row["found"], row["found_by_pillow"], row["visible_not_found"])
        print(f"| {row['damage']} | {row['files']} | " + " | ".join(f"{100 * s:.1f}" for s in shares) + " |")
    print(f"{refused} of {len(images)} sound images refused; wrote {options.json}")


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of sound JPEG files, at any depth")
    parser.add_argument("--progressive", action="store_true", help="save them as progressive files first")
    parser.add_argument("--repeats", type=positive(int), default=1, help="damaged copies an image and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULT_FOLDER / "damaged_images_cpu.json")
    options = parser.parse_args()
    try:
        run(options)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
