"""timm's train.py as a contender: asked as it wants to be, read as it prints, left out where it cannot distil."""

import pytest
import timm_peer

from kdav_fast.errors import InputError

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
NETWORKS = {"teacher": "timm:resnet34", "student": "timm:resnet18"}
SIZES = {**NETWORKS, "image_size": 64, "batch_size": 8, "classes": 5}
NAME = "timm train.py bf16 channels_last"


def checkout(folder, text=STAND_IN):
    (folder / "train.py").write_text(text)
    return folder


def test_its_steps_are_read_but_the_first_few(tmp_path):
    row = timm_peer.run_peer(NAME, checkout(tmp_path), tmp_path, SIZES, "cpu", 2, seconds=2.0)
    assert (row["contender"], row["rounds_images_per_s"]) == (NAME, [16.0] * 4)
    assert (row["median_step_s"], row["images"], row["seconds"]) == (0.5, 32, 2.0)
    asked = {"--model=resnet18", "--kd-model-name=resnet34", "--amp-dtype=bfloat16", "--channels-last"}
    asked |= {"--num-classes=5", "--img-size=64", "--batch-size=8", f"--data-dir={tmp_path}"}
    assert asked <= set((tmp_path / "asked.txt").read_text().split("\n"))


def test_one_that_fails_is_quoted(tmp_path):
    broken = checkout(tmp_path, "# --kd-model-name\nraise SystemExit('no such model')")
    with pytest.raises(InputError, match="printed no step to measure; its last line: no such model"):
        timm_peer.run_peer(NAME, broken, tmp_path, SIZES, "cpu", 1, seconds=0.1)


def test_where_it_cannot_take_part(tmp_path):
    assert "give --timm FOLDER" in timm_peer.why_not(None, *NETWORKS.values())
    with pytest.raises(InputError, match=r"holds no train\.py"):
        timm_peer.why_not(tmp_path, *NETWORKS.values())
    old = checkout(tmp_path, "print('labels only')")
    assert "so it cannot distil" in timm_peer.why_not(old, *NETWORKS.values())
    new = checkout(tmp_path)
    assert "cifar:resnet8 is not of timm" in timm_peer.why_not(new, "timm:resnet34", "cifar:resnet8")
    assert timm_peer.why_not(new, *NETWORKS.values()) == ""
