"""Parts that are carried to another machine: cut, checked, joined and laid out there, in any order and number."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import carry
import pytest

from tests.benchmarks.scripts import BENCHMARKS

SIZE = 4096


def make_wheel(folder, name):
    """The smallest that pip installs: one module with its own name in it."""
    wheel, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    contents = {
        f"{name}.py": f"NAME = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture
def packed(tmp_path):
    """The folder of parts: a wheel, then a teacher over several parts, then images."""
    photos = tmp_path / "photos"
    for number in range(3):
        place = photos / "train" / "cat" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes([number]) * 3000)
    (photos / "linked.jpg").symlink_to(photos / "train" / "cat" / "0.jpg")
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(bytes(range(256)) * 50)
    archive = tmp_path / "photos.tar"
    carry.pack_images("photos", photos, archive)
    files = {make_wheel(tmp_path, "small_thing"): "wheel", teacher: "teacher", archive: "images"}
    carry.pack(tmp_path / "out", files, SIZE)
    return tmp_path / "out"


@pytest.fixture
def store(packed, tmp_path):
    made = carry.Store(tmp_path / "store", tmp_path / "store" / "packages")
    made.take_manifest(packed / "manifest.json")
    return made


def parts_of(packed):
    return sorted(packed.glob("*.part"))


def test_parts_have_the_size_and_the_files_in_their_order(packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    parts = [path.read_bytes() for path in parts_of(packed)]
    assert [len(part) for part in parts[:-1]] == [SIZE] * (len(parts) - 1)
    assert 0 < len(parts[-1]) <= SIZE
    assert [one["name"] for one in manifest["parts"]] == [path.name for path in parts_of(packed)]
    everything = b"".join(parts)
    assert len(everything) == sum(file["size"] for file in manifest["files"])
    assert bytes(range(256)) * 50 in everything


def test_the_same_files_make_the_same_parts(packed, tmp_path):
    before = [path.read_bytes() for path in parts_of(packed)]
    again = tmp_path / "again.tar"
    carry.pack_images("photos", tmp_path / "photos", again)
    assert again.read_bytes() == (tmp_path / "photos.tar").read_bytes()
    files = {tmp_path / name: "x" for name in ("small_thing-1.0-py3-none-any.whl", "teacher.safetensors")}
    carry.pack(packed, {**files, again: "images"}, SIZE)
    assert [path.read_bytes() for path in parts_of(packed)] == before


def test_one_part_a_call_in_any_order(packed, store, tmp_path):
    for part in reversed(parts_of(packed)):
        assert store.take(part) == ""
        assert not part.exists()  # moved out of what is carried
        assert store.restore() == []
    assert store.missing() == []
    assert (store.target / "small_thing.py").read_text() == "NAME = 'small_thing'\n"
    assert (tmp_path / "store" / "teacher.safetensors").read_bytes() == bytes(range(256)) * 50
    for path in (tmp_path / "photos").rglob("*.jpg"):
        assert (
            store.images / "photos" / path.relative_to(tmp_path / "photos")
        ).read_bytes() == path.read_bytes()


def test_what_is_whole_is_used_before_the_rest_is_there(packed, store):
    first, *others = parts_of(packed)
    assert store.take(first) == ""
    store.restore()
    assert (store.target / "small_thing.py").exists()
    assert store.missing() == [part.name for part in others]
    assert list(store.images.iterdir()) == []


def test_a_damaged_part_is_named_and_not_taken(packed, store):
    part = parts_of(packed)[1]
    sound = part.read_bytes()
    for bad in (sound[:-1], bytes([sound[0] ^ 1]) + sound[1:]):
        part.write_bytes(bad)
        assert store.take(part) == f"{part.name} is damaged: carry it again"
        assert part.name in store.missing()
    part.write_bytes(sound)
    assert store.take(part) == ""
    stranger = part.with_name("carry-99.part")
    stranger.write_bytes(sound)
    assert store.take(stranger) == "carry-99.part is not in the manifest"


def test_repeating_it_changes_nothing(packed, store):
    copies = {part.name: part.read_bytes() for part in parts_of(packed)}
    for part in parts_of(packed):
        store.take(part)
    store.restore()
    module = store.target / "small_thing.py"
    module.write_text("changed")  # to see that it is not installed again
    for name, content in copies.items():
        (packed / name).write_bytes(content)
        assert store.take(packed / name) == ""
        assert store.restore() == []
    assert module.read_text() == "changed"
    assert store.missing() == []


def test_parts_of_another_packing_are_not_mixed(packed, store, tmp_path):
    carry.pack(tmp_path / "other", {tmp_path / "teacher.safetensors": "teacher"}, SIZE)
    with pytest.raises(carry.CarryError, match="holds parts of another manifest"):
        store.take_manifest(tmp_path / "other" / "manifest.json")


def test_the_command_says_what_is_missing_and_ends_with_1_until_nothing_is(packed, tmp_path):
    def unpack(*parts):
        command = [
            sys.executable,
            "-S",
            str(BENCHMARKS / "carry.py"),
            "unpack",
            str(tmp_path / "there"),
            *parts,
        ]
        # The package is found, so that nothing is linked in the repository.
        environment = {**os.environ, "PYTHONPATH": str(fake)}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    fake = tmp_path / "fake"
    (fake / "kdav_fast" / "kernels").mkdir(parents=True)
    (fake / "kdav_fast" / "__init__.py").touch()
    first, *others = map(str, parts_of(packed))
    part = unpack(first)
    assert part.returncode == 1, part.stderr
    assert f"not here yet: {', '.join(Path(other).name for other in others)}" in part.stdout
    whole = unpack(*others)
    assert whole.returncode == 0, whole.stderr
    assert f"all {len(others) + 1} parts are here" in whole.stdout
    assert f"export PYTHONPATH={tmp_path / 'there' / 'packages'}:" in whole.stdout
    again = unpack()
    assert again.returncode == 0
    nothing = subprocess.run(
        [sys.executable, str(BENCHMARKS / "carry.py"), "unpack", str(tmp_path / "empty")],
        capture_output=True,
        text=True,
    )
    assert nothing.returncode == 2
    assert "is no manifest; give --manifest FILE" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--part-mib", "0"], "--part-mib is 0; give at least 1"),
        (["--part-mib", "nan"], "--part-mib is nan"),
        (["--teacher", "nowhere"], "--teacher nowhere is no file"),
        (["--images", "photos=nowhere"], "--images has 'photos=nowhere'"),
        (["--images", "a/b=."], "a name without /"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_fetched(
    tmp_path, monkeypatch, capsys, arguments, reason
):
    monkeypatch.setattr(carry, "fetch_wheels", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(sys, "argv", ["carry.py", "pack", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as end:
        carry.main()
    assert end.value.code == 2
    assert reason in capsys.readouterr().err


def test_kernels_are_found_without_installing_the_package(tmp_path):
    (tmp_path / "kdav_fast").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kdav_fast" / "__init__.py").touch()
    (tmp_path / "kernels" / "__init__.py").write_text("HERE = True")
    for _ in range(2):
        carry.link_kernels(tmp_path)
    command = [sys.executable, "-S", "-c", "import kdav_fast.kernels as k; print(k.HERE)"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"


def test_every_pinned_wheel_has_a_version():
    versions = carry.pinned()
    assert versions["deepspeed"].startswith("deepspeed==0.19")
    absent = [name for group in carry.WHEELS.values() for name in group if name not in versions]
    assert absent == []
