import numpy as np
import pytest

from kdav_fast.data.folder import index_folder, open_folder, take_subset
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


def _remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: _remove(root), r"data\.root .* is not a folder"),
        (lambda root: _remove(root / "train"), r"has no train/ folder"),
        (lambda root: _remove(root / "val"), r"has neither val/ nor test/"),
        (lambda root: (root / "train/bird").mkdir(), r"class folder .*train/bird holds no images"),
        (lambda root: _remove(root / "val/cat"), r"differ: only train/ has 'cat'; both need"),
        (
            lambda root: (root / "val/cat").rename(root / "val/cow"),
            r"only train/ has 'cat'; only val/ has 'cow'",
        ),
        (lambda root: [_remove(root / "val" / name) for name in ("cat", "dog")], r"val has no class folders"),
        (lambda root: (root / "train/cat/\udcff.png").touch(), r"'train/cat/\\udcff.png'.*not valid UTF-8"),
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


def test_subset_is_seeded_sorted_and_keeps_its_labels(numbered_split):
    folder = numbered_split(12)
    subset = take_subset(folder, 5, seed=1)
    assert len(subset) == 5
    assert subset.classes == folder.classes
    assert list(subset.paths) == sorted(set(subset.paths))
    label_of = dict(zip(folder.paths, folder.labels, strict=True))
    assert [label_of[path] for path in subset.paths] == subset.labels.tolist()
    assert take_subset(folder, 5, seed=1).paths == subset.paths
    assert take_subset(folder, 5, seed=2).paths != subset.paths
    assert set(subset.paths) < set(take_subset(folder, 6, seed=1).paths)
    assert take_subset(folder, 12, seed=1).paths == folder.paths


def test_subset_larger_than_the_set_is_refused(numbered_split):
    with pytest.raises(InputError, match=r"data\.train_subset is 4 but .*train has 3 images"):
        take_subset(numbered_split(3), 4, seed=0)
