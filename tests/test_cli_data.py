"""`kdav data check` as a user meets it."""

import itertools
import json
import os
import signal
import sys
import time

import pytest
from PIL import Image

from kdav_fast.cli import main
from kdav_fast.data.checks import survey
from kdav_fast.data.checks.defects import Finding
from tests.train.processes import Fork


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two classes with 6 training and 2 evaluation images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "set"
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 7)).save(root / split / name / f"{number}.png")
    return root


def run(capsys, *arguments) -> tuple[int, list[str], list[str]]:
    """Exit code, lines on stdout, lines on stderr."""
    code = main(["data", "check", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_a_sound_data_set_is_one_line(root, capsys):
    code, output, errors = run(capsys, root, "--decode", "--workers", 2)
    assert (code, errors) == (0, [])
    (line,) = output
    assert line.startswith(f"{root}: 8 images (train 6, val 2), 2 classes, ")


def test_problems_are_listed_and_counted(root, capsys):
    (root / "train/cat/1.png").write_bytes(b"")
    (root / "train/cat/notes.txt").touch()
    (root / "train/emu").mkdir()
    code, output, errors = run(capsys, root)
    assert code == 2
    assert output == [
        "train/cat/notes.txt: note: a text file, which training passes over",
        "train/emu: a class folder without images; fill or remove it",
        "train/emu: no such class in val/",
        "train/cat/1.png: empty",
    ]
    (line,) = errors
    assert line.startswith(f"kdav: error: 3 problems in {root}: 8 images (train 6, val 2), 3 classes, ")
    assert line.endswith("; mend them, or leave 1 of them out by --quarantine FILE and data.skip_list")


def test_overrides_stand_anywhere(root, capsys):
    code, output, _ = run(capsys, root, "data.image_size=8", "--decode", "data.max_pixels=62")
    assert code == 2
    assert len(output) == 8
    assert output[0] == "train/cat/0.png: 9 x 7 pixels, more than data.max_pixels=62"


def test_json_is_one_object(root, capsys):
    (root / "val/dog/0.png").write_bytes(b"x")
    code, output, errors = run(capsys, root, "--json")
    assert code == 2
    found = json.loads("\n".join(output))
    assert found.pop("seconds") >= 0
    assert found == {
        "images": {"train": 6, "val": 2},
        "classes": 2,
        "problems": [{"path": "val/dog/0.png", "problem": "not an image of a known format"}],
        "notes": [],
    }
    assert len(errors) == 1


def test_a_quarantined_data_set_passes(root, tmp_path, capsys):
    (root / "train/dog/2.png").write_bytes(b"")
    skip_list = tmp_path / "skip.txt"
    code, _, errors = run(capsys, root, "--quarantine", skip_list)
    assert code == 2
    assert errors[0].endswith(f"; data.skip_list={skip_list} leaves 1 of them out")
    assert skip_list.read_text() == "train/dog/2.png\tempty\n"
    code, output, _ = run(capsys, root, f"data.skip_list={skip_list}")
    assert code == 0
    assert "7 images (train 5, val 2)" in output[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "'0' is not a whole number of at least 1"),
        (["--workers", "many"], "'many' is not a whole number of at least 1"),
        (["data.max_pixel=1"], "the nearest known one is 'data.max_pixels'"),
        (["--quarantine", "/dev/null/x"], "cannot write /dev/null/x"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_arguments(root, capsys, arguments, message):
    code, _, (line,) = run(capsys, root, *arguments)
    assert code == 2
    assert message in line


def test_a_command_is_needed(capsys):
    assert main(["data"]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_no_such_folder(tmp_path, capsys):
    code, output, (line,) = run(capsys, tmp_path / "nowhere")
    assert (code, output) == (2, [])
    assert "nowhere is not a folder" in line


def interrupt_the_first_of_slow_checks(root, log):
    """Check images as `kdav` does, each in 10 ms, with a byte in `log` for each; Ctrl-C comes with the first."""
    written, numbers = os.open(log, os.O_WRONLY | os.O_CREAT), itertools.count()

    def slowly(*arguments, **options):
        os.write(written, b".")
        if next(numbers) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return Finding(None)

    survey.examine = slowly
    sys.exit(main(["data", "check", root, "--workers", "2"]))


def test_ctrl_c_ends_it(root, tmp_path):
    for number in range(2000):
        (root / f"train/cat/x{number}.png").touch()
    process = Fork([__file__, root, tmp_path / "log"], dict(os.environ))
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (130, "", "kdav: interrupted\n")
    assert (tmp_path / "log").stat().st_size < 1000


if __name__ == "__main__":
    interrupt_the_first_of_slow_checks(*sys.argv[1:])
