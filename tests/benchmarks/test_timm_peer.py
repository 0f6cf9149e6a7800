"""timm's train.py as a contender: asked as it wants to be, read as it prints, left out where it cannot distil."""

import importlib
from pathlib import Path

import pytest

from kdav_fast.errors import InputError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Prints what timm's train.py does, and what it was asked for into a file beside itself.
STAND_IN = """
import pathlib, sys, time
# --kd-model-name
pathlib.Path(__file__).with_name("asked.txt").write_text("\\n".join(sys.argv[1:]))
print("Training in mixed precision", flush=True)
for step in range(1000):
    seconds = 9.0 if step < 3 else 0.5
    print(f"Train: 0 [{step:>4d}/1000 (  1%)]  Loss: 6.93 (6.93)  "
          f"Time: {seconds:.3f}s, {8 / seconds:>7.2f}/s  ({seconds:.3f}s,    1.00/s)  LR: 1.000e-02",
          flush=True)
"""
SIZES = {
    "teacher": "timm:resnet34",
    "student": "timm:resnet18",
    "image_size": 64,
    "batch_size": 8,
    "classes": 5,
}


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("timm_peer")


def checkout(folder, text=STAND_IN):
    (folder / "train.py").write_text(text)
    return folder


def test_its_steps_are_read_but_the_first_few(peer, tmp_path):
    name = "timm train.py bf16 channels_last"
    row = peer.run_peer(name, checkout(tmp_path), tmp_path, SIZES, "cpu", 2, seconds=2.0)
    assert row["contender"] == name
    assert row["rounds_images_per_s"] == [16.0] * 4
    assert (row["median_images_per_s"], row["median_step_s"], row["images"], row["seconds"]) == (
        16.0,
        0.5,
        32,
        2.0,
    )
    asked = (tmp_path / "asked.txt").read_text().split("\n")
    for option in ("--model=resnet18", "--kd-model-name=resnet34", "--amp-dtype=bfloat16", "--channels-last"):
        assert option in asked
    for option in ("--num-classes=5", "--img-size=64", "--batch-size=8", f"--data-dir={tmp_path}"):
        assert option in asked


def test_one_that_fails_is_quoted(peer, tmp_path):
    broken = checkout(tmp_path, "# --kd-model-name\nraise SystemExit('no such model')")
    with pytest.raises(InputError, match="printed no step to measure; its last line: no such model"):
        peer.run_peer(next(iter(peer.PEERS)), broken, tmp_path, SIZES, "cpu", 1, seconds=0.1)


def test_where_it_cannot_take_part(peer, tmp_path):
    assert "give --timm FOLDER" in peer.why_not(None, "timm:resnet34", "timm:resnet18")
    with pytest.raises(InputError, match=r"holds no train\.py"):
        peer.why_not(tmp_path, "timm:resnet34", "timm:resnet18")
    old = checkout(tmp_path, "print('labels only')")
    assert "has no --kd-model-name, so it cannot distil" in peer.why_not(
        old, "timm:resnet34", "timm:resnet18"
    )
    new = checkout(tmp_path)
    assert "cifar:resnet8 is not of timm" in peer.why_not(new, "timm:resnet34", "cifar:resnet8")
    assert peer.why_not(new, "timm:resnet34", "timm:resnet18") == ""
