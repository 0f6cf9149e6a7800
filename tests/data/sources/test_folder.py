import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdav_fast.data.sources.folder import index_folder, open_evaluation_folder, open_folder, open_regular_file
from kdav_fast.errors import InputError


@pytest.fixture
def root(tmp_path):
    for path in (
        "train/dog/b.JPG",
        "train/dog/a.png",
        "train/dog/deeper/still/c.TIFF",
        "train/dog/notes.txt",
        "train/dog/.hidden.png",
        "train/cat/z.webp",
        "train/.cache/x.png",
        "train/list.csv",
        "val/cat/1.bmp",
        "val/dog/1.ppm",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def test_the_index_is_sorted_and_takes_images_at_any_depth(root):
    train, evaluation = open_folder(root)
    assert train.classes == evaluation.classes == ("cat", "dog")
    assert train.paths == (
        "train/cat/z.webp",
        "train/dog/a.png",
        "train/dog/b.JPG",
        "train/dog/deeper/still/c.TIFF",
    )
    assert train.labels.tolist() == [0, 1, 1, 1]
    assert train.labels.dtype == np.int64
    assert evaluation.split == "val"
    assert evaluation.paths == ("val/cat/1.bmp", "val/dog/1.ppm")


def test_links_to_class_folders_are_followed(root, tmp_path):
    (root / "linked/train").mkdir(parents=True)
    (root / "linked/train/pet").symlink_to(root / "train/dog")
    assert index_folder(root / "linked", "train").paths[0] == "train/pet/a.png"


def test_test_folder_serves_where_there_is_no_val(root):
    (root / "val").rename(root / "test")
    assert open_folder(root)[1].split == "test"


def test_digest_follows_paths_and_labels_but_not_the_place(root, tmp_path):
    digest = index_folder(root, "train").digest
    assert index_folder(root, "train").digest == digest
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    root.rename(moved)
    assert index_folder(moved, "train").digest == digest
    (moved / "train/dog/b.JPG").rename(moved / "train/cat/b.JPG")
    assert index_folder(moved, "train").digest != digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), r"data\.root .* is not a folder"),
        (lambda root: shutil.rmtree(root / "train"), r"has no train/ folder"),
        (lambda root: shutil.rmtree(root / "val"), r"has neither val/ nor test/"),
        (lambda root: (root / "train/bird").mkdir(), r"class folder .*train/bird holds no images"),
        (lambda root: shutil.rmtree(root / "val/cat"), r"differ: only train/ has 'cat'; both need"),
        (
            lambda root: (root / "val/cat").rename(root / "val/cow"),
            r"only train/ has 'cat'; only val/ has 'cow'",
        ),
        (
            lambda root: [shutil.rmtree(root / "val" / name) for name in ("cat", "dog")],
            r"val has no class folders",
        ),
        (lambda root: (root / "train/b\udcffd").mkdir(), r"train/b\\xffd is not named in UTF-8.*; rename"),
        (lambda root: (root / "val/b\udcffd").mkdir(), r"val/b\\xffd is not named in UTF-8"),
    ],
)
def test_a_wrong_tree_is_refused_in_one_line(root, damage, message):
    damage(root)
    with pytest.raises(InputError, match=message) as error:
        open_folder(root)
    assert "\n" not in str(error.value)


def test_many_different_classes_are_counted(root):
    for i in range(8):
        (root / f"train/extra{i}").mkdir()
        (root / f"train/extra{i}/1.png").touch()
    with pytest.raises(InputError, match=r"'extra4' and 3 more"):
        open_folder(root)


@pytest.mark.parametrize("place", [".", "./", "..", "absolute"])
def test_the_place_of_the_root_does_not_matter(root, monkeypatch, place):
    monkeypatch.chdir(root / "train" if place == ".." else root)
    where = root if place == "absolute" else Path(place)
    images = index_folder(where, "train")
    assert images.paths[1] == "train/dog/a.png"
    assert images.read(1).size == 0


def test_a_file_name_need_not_be_utf_8(root):
    (root / "train/cat/\udcff\udc80.png").write_bytes(b"image")
    train = index_folder(root, "train")
    assert train.paths[:2] == ("train/cat/z.webp", "train/cat/\udcff\udc80.png")
    assert train.name(1) == "train/cat/\udcff\udc80.png"
    assert train.read(1).tobytes() == b"image"
    assert train.signature(1).startswith("5 ")
    digest = train.digest
    (root / "train/cat/\udcff\udc80.png").rename(root / "train/cat/\udcff\udc81.png")
    assert index_folder(root, "train").digest != digest


@pytest.mark.parametrize(
    "links",
    [
        {"train/dog/self": "."},
        {"train/dog/up": ".."},
        {"train/dog/deeper/still/up": "../.."},
        {"train/dog/top": "../.."},
        {"train/dog/whole": "/"},
        {"train/all": "."},
        {"train/all": ".."},
        {"train/all": "/"},
        {"train/dog/to_cat": "../cat", "train/cat/to_dog": "../dog"},
        {"train/dog/to_val": "../../val", "val/cat/to_dog": "../../train/dog"},
    ],
)
def test_a_link_that_leads_back_is_refused(root, links):
    for link, target in links.items():
        (root / link).symlink_to(target)
    with pytest.raises(
        InputError, match=r"the link .*train/.* leads back to a folder above it; remove the link"
    ):
        index_folder(root, "train")


def test_links_to_folders_beside_or_outside_are_followed(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "more").mkdir()
    (outside / "more/x.png").touch()
    (root / "train/cat/beside").symlink_to("../dog")
    (root / "train/cat/outside").symlink_to(outside)
    (root / "train/fox").symlink_to("../val/dog")
    (root / "val/fox").mkdir()
    (root / "val/fox/1.png").symlink_to(outside / "more/x.png")
    train, evaluation = open_folder(root)
    assert [path for path in train.paths if "side/" in path or "fox" in path] == [
        "train/cat/beside/a.png",
        "train/cat/beside/b.JPG",
        "train/cat/beside/deeper/still/c.TIFF",
        "train/cat/outside/more/x.png",
        "train/fox/1.ppm",
    ]
    assert "val/fox/1.png" in evaluation.paths


def test_a_split_may_itself_be_a_link(root, tmp_path):
    moved = tmp_path / "elsewhere/images"
    moved.parent.mkdir()
    (root / "train").rename(moved)
    (root / "train").symlink_to(moved)
    assert index_folder(root, "train").paths[0] == "train/cat/z.webp"
    (moved / "dog/up").symlink_to(moved.parent)
    with pytest.raises(InputError, match=r"train/dog/up leads back"):
        index_folder(root, "train")


def test_a_link_to_itself_is_no_class(root):
    (root / "train/ring").symlink_to("ring")
    assert index_folder(root, "train").classes == ("cat", "dog")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_regular_file_raises_at_once(root, make):
    path = root / "train/dog/b.JPG"
    path.unlink()
    make(path)
    with pytest.raises(OSError, match=r"not a regular file|No such file"):
        open_regular_file(str(path))
    if not path.is_dir():
        train = index_folder(root, "train")
        position = train.paths.index("train/dog/b.JPG")
        for read in (train.open, train.read):
            with pytest.raises(OSError, match=r"not a regular file|No such file"):
                read(position)


def test_a_regular_file_opens_at_its_start(root):
    (root / "train/dog/a.png").write_bytes(b"0123456789")
    with open_regular_file(str(root / "train/dog/a.png")) as file:
        assert file.tell() == 0
        assert file.read(3) == b"012"
        assert file.seek(-2, os.SEEK_END) == 8
        assert file.read() == b"89"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("folder", ["train", "train/dog", "train/dog/deeper", "val", "."])
def test_a_folder_without_permission_is_refused(root, folder):
    (root / folder).chmod(0)
    try:
        with pytest.raises(InputError, match=r"folder .* cannot be read: Permission denied; check"):
            open_folder(root)
    finally:
        (root / folder).chmod(0o755)


@pytest.mark.parametrize("folder", ["train", "train/dog", "train/dog/deeper", "val"])
def test_a_folder_that_cannot_be_listed_is_refused(root, folder, monkeypatch):
    def fail(listed):
        def list_or_fail(path):
            if os.path.realpath(path) == str(root / folder):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return listed(path)

        return list_or_fail

    monkeypatch.setattr(os, "listdir", fail(os.listdir))
    monkeypatch.setattr(os, "scandir", fail(os.scandir))
    with pytest.raises(InputError, match=rf"folder .*{folder} cannot be read: Permission denied; check"):
        open_folder(root)


@pytest.fixture
def flat(tmp_path):
    """ImageNet as published: class folders to train, one folder to evaluate."""
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    for name in ("n02", "n01", "n10"):
        (root / "train" / name).mkdir(parents=True)
        (root / "train" / name / f"{name}_1.JPEG").touch()
    (root / "val").mkdir()
    for number in (3, 1, 2):
        (root / f"val/ILSVRC2012_val_{number:08}.JPEG").touch()
    return root


def _lines(separator=" ", labels=("n02", "n10", "n01")):
    return "".join(f"ILSVRC2012_val_{i:08}.JPEG{separator}{label}\n" for i, label in enumerate(labels, 1))


_KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{number:08},{name} 85 1 499 272 {name} 1 2 3 4 \n"
    for number, name in ((3, "n01"), (1, "n02"), (2, "n10"))
)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (
            "val/val_annotations.txt",
            _lines("\t", [f"{name}\t0\t32\t44\t62" for name in ("n02", "n10", "n01")]),
        ),
        ("val/val.txt", _lines()),
        ("val/val_labels.txt", _lines(",")),
        ("val.txt", _lines(" ", (1, 2, 0))),
        ("val_labels.txt", _lines("\t", (1, 2, 0))),
        ("LOC_val_solution.csv", _KAGGLE),
        ("../LOC_val_solution.csv", _KAGGLE),
        ("../../LOC_val_solution.csv", _KAGGLE),
        ("../../../LOC_val_solution.csv", _KAGGLE),
    ],
)
def test_a_flat_val_gets_its_classes_from_the_file_beside_it(flat, file, content):
    (flat / file).write_text(content)
    train, evaluation = open_folder(flat)
    assert train.classes == evaluation.classes == ("n01", "n02", "n10")
    assert evaluation.split == "val"
    assert evaluation.paths == tuple(f"val/ILSVRC2012_val_{i:08}.JPEG" for i in (1, 2, 3))
    assert evaluation.labels.tolist() == [1, 2, 0]
    assert evaluation.labels.dtype == np.int64


def test_the_first_file_counts_and_a_named_one_before_all(flat, tmp_path):
    for file, label in (("val/val_annotations.txt", 0), ("val/val.txt", 1), ("val.txt", 2)):
        (flat / file).write_text(_lines(labels=[label] * 3))
    assert open_evaluation_folder(flat).labels.tolist() == [0, 0, 0]
    (flat / "val/val_annotations.txt").unlink()
    assert open_evaluation_folder(flat).labels.tolist() == [1, 1, 1]
    named = tmp_path / "mine.tsv"
    named.write_text(_lines(labels=(2, 2, 1)))
    assert open_folder(flat, named)[1].labels.tolist() == [2, 2, 1]


def test_kaggles_file_is_found_through_a_link(flat, tmp_path):
    (tmp_path / "LOC_val_solution.csv").write_text(_KAGGLE)
    link = tmp_path / "away/imagenet"
    link.parent.mkdir()
    link.symlink_to(flat)
    assert open_folder(link)[1].labels.tolist() == [1, 2, 0]


def test_tiny_imagenet_opens_as_published(tmp_path):
    for name in ("n02", "n01"):
        (tmp_path / f"train/{name}/images").mkdir(parents=True)
        (tmp_path / f"train/{name}/images/{name}_0.JPEG").touch()
        (tmp_path / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t40\n")
    for path in ("val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "val/val_annotations.txt").write_text(
        "val_1.JPEG\tn01\t0\t32\t44\t62\nval_0.JPEG\tn02\t52\t55\t57\t59\n"
    )
    train, evaluation = open_folder(tmp_path)
    assert train.paths == ("train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG")
    assert evaluation.paths == ("val/images/val_0.JPEG", "val/images/val_1.JPEG")
    assert evaluation.labels.tolist() == [1, 0]
    (tmp_path / "val/val_annotations.txt").unlink()
    with pytest.raises(InputError, match=r"val has no class folders, and no file .*val/val_annotations\.txt"):
        open_folder(tmp_path)


def test_a_label_file_does_not_beat_class_folders(root):
    (root / "val.txt").write_text("1.bmp dog\n1.ppm cat\n")
    assert open_folder(root)[1].labels.tolist() == [0, 1]
    assert open_evaluation_folder(root, ("cat",)).labels.tolist() == [0, 1]
    shutil.rmtree(root / "train")
    assert open_evaluation_folder(root).labels.tolist() == [0, 1]
    assert open_evaluation_folder(root, ("cat", "dog"), root / "val.txt").labels.tolist() == [1, 0]


def test_a_student_brings_the_classes_where_there_is_no_train(flat):
    (flat / "val.txt").write_text(_lines())
    shutil.rmtree(flat / "train")
    evaluation = open_evaluation_folder(flat, ("n10", "n02", "n01"))
    assert evaluation.classes == ("n10", "n02", "n01")
    assert evaluation.labels.tolist() == [1, 0, 2]
    (flat / "val.txt").write_text(_lines(labels=(0, 1, 2)))
    assert open_evaluation_folder(flat, ("n10", "n02", "n01")).labels.tolist() == [2, 1, 0]
    with pytest.raises(InputError, match=r"are those of train/, which .* lacks; add train/CLASS/"):
        open_evaluation_folder(flat)


def test_a_flat_test_needs_the_name_of_its_file(flat):
    (flat / "val").rename(flat / "test")
    (flat / "val.txt").write_text(_lines())
    with pytest.raises(InputError, match=r"test has no class folders.*set data\.val_labels"):
        open_folder(flat)
    evaluation = open_folder(flat, flat / "val.txt")[1]
    assert (evaluation.split, evaluation.paths[0]) == ("test", "test/ILSVRC2012_val_00000001.JPEG")
    assert evaluation.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: None,
            r"no file was found.*LOC_val_solution\.csv.*; set data\.val_labels, or put images at",
        ),
        (
            lambda root: (root / "val.txt").write_text("".join(_lines().splitlines(True)[:2])),
            r"val\.txt has no line",
        ),
        (
            lambda root: [
                (root / "val.txt").write_text("a n01"),
                *[p.unlink() for p in (root / "val").iterdir()],
            ],
            r"val holds no images .*, but .*val\.txt names its classes; put them there",
        ),
    ],
)
def test_a_flat_val_that_does_not_fit_is_refused_in_one_line(flat, damage, message):
    damage(flat)
    with pytest.raises(InputError, match=message) as error:
        open_folder(flat)
    assert "\n" not in str(error.value)


def test_a_flat_val_may_not_loop(flat):
    (flat / "val.txt").write_text(_lines())
    (flat / "val/again").symlink_to(".")
    with pytest.raises(InputError, match=r"val/again leads back"):
        open_folder(flat)
