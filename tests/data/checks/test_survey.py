"""`survey` on trees with everything wrong, and on the other layouts."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdav_fast.config import DataConfig
from kdav_fast.data.checks.scan import check_images
from kdav_fast.data.checks.survey import config_of, survey
from kdav_fast.data.sources import open_images
from kdav_fast.data.sources.digits import prepare_digits
from kdav_fast.errors import InputError


def image_bytes(kind="PNG", size=(6, 4), seed=0) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


PNG, JPEG = image_bytes("PNG"), image_bytes("JPEG")
MIDDLE = len(PNG) // 2
MIDDLE_DAMAGED = PNG[:MIDDLE] + bytes([PNG[MIDDLE] ^ 0xFF]) + PNG[MIDDLE + 1 :]


@pytest.fixture
def root(tmp_path):
    """Two sound classes in train/ and val/."""
    root = tmp_path / "set"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for number, suffix in enumerate(("png", "jpg")):
                path = root / split / name / f"{number}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(PNG if suffix == "png" else JPEG)
    return root


def look(root, decode=False, **options):
    return survey(DataConfig(name="folder", root=root, **options), decode, progress=False)


def problems(root, decode=False, **options) -> dict[str, str]:
    found = look(root, decode, **options).problems
    assert len(found) == len(set(found))
    return dict(found)


def test_a_sound_tree(root):
    found = look(root, decode=True)
    assert (found.images, found.classes) == ({"train": 4, "val": 4}, 2)
    assert found.problems == found.notes == found.defects == []
    assert found.summary().startswith("8 images (train 4, val 4), 2 classes, ")


@pytest.mark.parametrize(
    ("damage", "path", "text"),
    [
        (lambda root: (root / "train/dog/0.png").write_bytes(PNG[:-12]), "train/dog/0.png", "truncated"),
        (lambda root: (root / "val/dog/1.jpg").write_bytes(b"hello"), "val/dog/1.jpg", "not an image"),
        (lambda root: (root / "val/dog/1.jpg").write_bytes(b""), "val/dog/1.jpg", "empty"),
        (lambda root: os.mkfifo(root / "train/cat/p.png"), "train/cat/p.png", "not a regular file"),
        (lambda root: os.mkfifo(root / "train/cat/p"), "train/cat/p", "passes it over: not a regular file"),
        (
            lambda root: (root / "train/cat/l.png").symlink_to("l.png"),
            "train/cat/l.png",
            "levels of symbolic links",
        ),
        (lambda root: (root / "train/cat/d.png").symlink_to("x"), "train/cat/d.png", "No such file"),
        (lambda root: (root / "train/cat/d").symlink_to("x"), "train/cat/d", "No such file"),
        (lambda root: (root / "train/cat/a.heic").write_bytes(b"\0\0"), "train/cat/a.heic", "its suffix"),
        (lambda root: (root / "train/cat/a.jpg1").write_bytes(JPEG), "train/cat/a.jpg1", "its suffix"),
        (lambda root: (root / "train/a.png").write_bytes(PNG), "train/a.png", "in no class folder"),
        (
            lambda root: (root / "train/cat/up").symlink_to(".."),
            "train/cat/up",
            "leads back to a folder above",
        ),
        (
            lambda root: (root / "train/cat/deep").symlink_to(root),
            "train/cat/deep",
            "leads back to a folder above",
        ),
        (lambda root: (root / "train/cat/a\tb.png").write_bytes(PNG), "train/cat/a\tb.png", "tab or a line"),
        (lambda root: (root / "train/cat/a\nb.png").write_bytes(PNG), "train/cat/a\nb.png", "tab or a line"),
        (lambda root: (root / "train/wolf").symlink_to("nowhere"), "train/wolf", "link that leads nowhere"),
    ],
)
def test_one_problem_at_a_time(root, damage, path, text):
    damage(root)
    found = problems(root)
    assert list(found) == [path]
    assert text in found[path]


def add_class(root, name, split="train"):
    (root / split / name).mkdir()
    (root / split / name / "0.png").write_bytes(PNG)


@pytest.mark.parametrize(
    ("name", "like"),
    [("CAT", "cat"), (" cat", "cat"), ("cat ", "cat"), ("e\u0301", "\xe9"), ("STRASSE", "straße")],
)
def test_classes_that_people_take_for_one(root, name, like):
    for split in ("train", "val"):
        add_class(root, name, split)
        if like != "cat":
            add_class(root, like, split)
    found = problems(root)
    assert sorted(path.split("/")[0] for path in found) == ["train", "val"]
    for path, text in found.items():
        folders = {path, text.removeprefix("differs from ").partition(" only in case")[0]}
        assert folders == {f"{path.split('/')[0]}/{one}" for one in (name, like)}


def test_links_to_one_class_folder(root):
    for split in ("train", "val"):
        (root / split / "alias").symlink_to("cat")
    assert problems(root) == {
        f"{split}/alias": f"the same folder as {split}/cat; remove the link" for split in ("train", "val")
    }


def test_classes_of_one_split_only(root):
    add_class(root, "emu")
    (root / "val/dog").rename(root / "val/Dog")
    assert problems(root) == {
        "train/emu": "no such class in val/",
        "train/dog": "no such class in val/ (but val/Dog)",
        "val/Dog": "no such class in train/ (but train/dog)",
    }


def test_splits_without_a_common_class_are_one_problem(root):
    for name in ("cat", "dog"):
        (root / "val" / name).rename(root / "val" / f"the {name}")
    assert problems(root) == {"val": "no class in common with train/; both need the same class folders"}


def test_class_folders_that_are_empty_or_not_in_utf8(root):
    (root / "train" / os.fsdecode(b"caf\xe9")).mkdir()
    found = look(root)
    assert found.lines() == [
        "train/caf\\xe9: a class folder whose name is not UTF-8; rename it",
        "train/caf\\xe9: a class folder without images; fill or remove it",
        "train/caf\\xe9: no such class in val/",
    ]
    json.dumps(found.as_json()).encode()


def test_everything_at_once(root):
    """Several problems in one class, and others beside it: none hides another."""
    for name in ("a", "b", "c"):
        (root / f"train/cat/{name}.png").write_bytes(b"")
    (root / "train/cat/x.bin").write_bytes(b"\0\1")
    (root / "train/empty").mkdir()
    (root / "val/dog/1.jpg").write_bytes(JPEG[:-9])
    assert set(problems(root)) == {
        *(f"train/cat/{name}" for name in ("a.png", "b.png", "c.png", "x.bin")),
        "train/empty",
        "val/dog/1.jpg",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(root):
    (root / "train/cat").chmod(0)
    (root / "val/cat/0.png").chmod(0)
    found = problems(root)
    (root / "train/cat").chmod(0o700)
    assert "Permission denied" in found["train/cat"]
    assert found["val/cat/0.png"] == "cannot be read: Permission denied"


def test_a_folder_that_cannot_be_listed(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train/cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("kdav_fast.data.checks.class_tree.os.scandir", refuse)
    (root / "val/dog/0.png").write_bytes(b"")
    assert look(root).problems == [
        ("train/cat", "cannot be read: Permission denied; check its permissions"),
        ("val/dog/0.png", "empty"),
    ]


def test_notes_are_no_problems(root):
    (root / "train/cat/boxes.txt").write_text("é" * 300)
    (root / "train/cat/Thumbs").touch()
    (root / "train/cat/0.png").write_bytes(JPEG)
    (root / "train/list.csv").touch()
    (root / "train/.hidden").mkdir()
    (root / "train/cat/.x.heic").write_bytes(b"GIF89a\0")
    found = look(root)
    assert found.problems == []
    assert found.lines() == [
        "train/cat/Thumbs: note: a text file, which training passes over",
        "train/cat/boxes.txt: note: a text file, which training passes over",
        "train/cat/0.png: note: is a JPEG, and is decoded as such",
    ]
    open_images(DataConfig(name="folder", root=root), seed=0)


def test_decoding_finds_more(root):
    (root / "val/cat/0.png").write_bytes(MIDDLE_DAMAGED)
    assert problems(root) == {}
    (text,) = problems(root, decode=True).values()
    assert text.startswith("damaged: ")


def test_large_images(root):
    assert set(problems(root, max_pixels=23).values()) == {"4 x 6 pixels, more than data.max_pixels=23"}
    assert problems(root, max_pixels=24) == {}


def test_a_quarantine_makes_a_run_start(root, tmp_path):
    bad = {
        "train/cat/0.png": b"",
        "val/dog/1.jpg": JPEG[:-9],
        os.fsdecode(b"train/dog/\xff.png"): PNG[:-12],
    }
    for path, content in bad.items():
        (root / path).write_bytes(content)
    skip_list = tmp_path / "skip.txt"
    found = look(root)
    assert dict(found.defects).keys() == bad.keys()
    found.write_quarantine(skip_list)
    with pytest.raises(
        InputError, match=f"3 problems in set: 9 images .*data.skip_list={skip_list} leaves 3"
    ):
        found.require_no_problems(Path("set"), skip_list)

    config = DataConfig(name="folder", root=root, skip_list=skip_list)
    images = open_images(config, seed=0)
    assert [len(split) for split in images] == [3, 3]
    for split in images:
        check_images(split, config.max_pixels, progress=False)
    again = look(root, skip_list=skip_list)
    assert (again.problems, again.images) == ([], {"train": 3, "val": 3})
    with pytest.raises(InputError, match="cannot be used: train/cat/0.png"):
        check_images(
            open_images(DataConfig(name="folder", root=root), 0).train, config.max_pixels, progress=False
        )


def test_a_quarantine_leaves_out_names_that_it_cannot_carry(root, tmp_path):
    (root / "train/cat/a\nval").mkdir()
    (root / "train/cat/a\nval/cat.png").write_bytes(b"")
    found = look(root)
    assert {text for _, text in found.problems} >= {"empty"}
    assert found.defects == []
    found.write_quarantine(tmp_path / "skip.txt")
    assert (tmp_path / "skip.txt").read_bytes() == b""
    assert all("\n" not in line for line in found.lines())


def test_parts_of_a_data_set(root):
    (root / "val").rename(root.parent / "elsewhere")
    assert look(root).images == {"train": 4}
    (root / "train").rename(root / "test")
    assert look(root).images == {"test": 4}
    (root / "test").rename(root / "val")
    (root / "val/cat/0.png").write_bytes(b"")
    assert problems(root) == {"val/cat/0.png": "empty"}


def test_class_folders_right_in_the_folder_are_called_as_a_run_would_call_them(root, monkeypatch):
    (root / "train/cat/0.png").write_bytes(b"")
    assert problems(root / "train") == {"train/cat/0.png": "empty"}
    monkeypatch.chdir(root / "train")
    assert problems(Path()) == {"train/cat/0.png": "empty"}


@pytest.mark.parametrize("split", ["train", "val", ""])
def test_a_folder_without_classes_is_a_problem_and_its_images_are_examined(root, split):
    (root / "flat" / split).mkdir(parents=True)
    (root / "flat" / split / "a.png").write_bytes(b"")
    found = problems(root / "flat")
    name = split or "flat"
    assert found.keys() == {name, f"{name}/a.png"}
    assert "has no class folders" in found[name]
    assert found[f"{name}/a.png"] == "empty"


def make_flat(root, labels: str):
    """Tiny-ImageNet's layout of val/."""
    (root / "val/images").mkdir()
    for number, path in enumerate(sorted((root / "val").glob("*/*.*"))):
        path.rename(root / f"val/images/val_{number}{path.suffix}")
    for name in ("cat", "dog"):
        (root / "val" / name).rmdir()
    (root / "val/val_annotations.txt").write_text(labels)


def test_evaluation_images_in_one_folder(root):
    names = ["val_0.png\tcat\t0\t0\t9\t9", "val_1.jpg\tcat\t0\t0\t9\t9", "val_2.png\tdog\t0\t0\t9\t9"]
    make_flat(root, "\n".join([*names, "val_3.jpg\tdog\t0\t0\t9\t9\n"]))
    assert look(root).problems == []
    (root / "val/images/val_2.png").write_bytes(b"")
    assert problems(root) == {"val/images/val_2.png": "empty"}


def test_evaluation_images_in_one_folder_with_wrong_labels(root):
    make_flat(root, "val_0.png\tcow\n")
    (root / "val/images/val_2.png").write_bytes(b"")
    found = look(root).problems
    assert [path for path, _ in found] == ["val", "val", "val/images/val_2.png"]
    assert "'cow' is none of the 2 classes" in found[0].text


def test_tar_shards_are_recognised_and_examined(root, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        with tarfile.open(shards / f"{split}-0.tar", "w") as tar:
            for key, image in (("a", PNG), ("b", PNG[:-12] if split == "val" else JPEG)):
                for name, content in ((f"{key}.png", image), (f"{key}.cls", b"0")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    config = config_of(shards, [])
    assert config.name == "webdataset"
    found = survey(config, decode=True, progress=False)
    assert found.images == {"train": 2, "val": 2}
    assert found.problems == [("val-0.tar/b.png", "truncated")]
    assert found.notes == [("train-0.tar/b.png", "is a JPEG, and is decoded as such")]
    (root / "ILSVRC2012_img_train.tar").touch()  # beside the tree that it was unpacked to
    assert config_of(root, []).name == "folder"


def test_digits_are_sound(tmp_path):
    found = survey(config_of(prepare_digits(tmp_path), ["data.name=digits"]), progress=False)
    assert (found.images, found.classes, found.problems) == ({"train": 897, "val": 900}, 10, [])


def test_config_takes_any_override_but_another_root(root):
    config = config_of(root, ["data.max_pixels=5", "train.epochs=3"])
    assert (config.max_pixels, config.root) == (5, root)
    with pytest.raises(InputError, match="data.root is /x but FOLDER is"):
        config_of(root, ["data.root=/x"])
    with pytest.raises(InputError, match=r"unknown key 'data.max_pixel'"):
        config_of(root, ["data.max_pixel=5"])


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder; give the folder that holds train/"):
        look(tmp_path / "nowhere")
