"""The benchmark of damaged images: what it damages, and what it counts."""

import json
import runpy
import sys

import damaged_images
import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.scripts import BENCHMARKS, refusal


@pytest.fixture
def photographs(tmp_path):
    noise = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("name", damaged_images.DAMAGES)
def test_damage_stays_inside_the_codes(photographs, name):
    image = (photographs / "0.jpg").read_bytes()
    start = damaged_images.codes_start(image)
    assert image[:start].count(b"\xff\xda") == 1
    try:
        damaged = damaged_images.DAMAGES[name](bytearray(image), start, np.random.default_rng(0))
    except ValueError:
        assert len(image) < 4096 * 3
        return
    assert damaged != image
    assert damaged[:start] == image[:start]
    assert damaged.endswith(b"\xff\xd9")


def test_rows_hold_what_is_found_and_what_could_be_seen(photographs, tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["damaged_images.py", f"--root={photographs}", f"--json={result}"])
    runpy.run_path(str(BENCHMARKS / "damaged_images.py"), run_name="__main__")
    written = json.loads(result.read_text())
    assert (written["images"], written["sound_images_refused"]) == (3, 0)
    half = next(row for row in written["rows"] if row["damage"].startswith("cut in half"))
    assert (half["files"], half["found"], half["visible_not_found"]) == (3, 1.0, 0.0)


def test_a_folder_without_photographs(tmp_path, monkeypatch, capsys):
    line = refusal("damaged_images.py", ["--root", str(tmp_path)], monkeypatch, capsys)
    assert "holds no JPEG files" in line
