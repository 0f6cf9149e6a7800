"""A run goes on with the images that it was begun with, or says which ones are others."""

import shutil

import pytest

from kdav_fast.data.fingerprint import fingerprint
from kdav_fast.data.sources.digits import prepare_digits
from kdav_fast.data.sources.folder import open_folder
from kdav_fast.errors import InputError
from kdav_fast.train.folder.data import FILE_NAME, check_run_data, write_run_data
from kdav_fast.train.loop import run_training
from tests.train.interrupt import stop_after


@pytest.fixture
def digits(tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(prepare_digits(), tmp_path / "digits")


def replace_by_another(digits, split):
    images = sorted(digits.glob(f"{split}/7/*.png"))
    images[40].write_bytes(images[41].read_bytes())


def test_a_run_does_not_continue_with_other_pixels_under_the_same_names(
    small_config, digits, tmp_path, monkeypatch
):
    data = {"name": "folder", "root": str(digits), "train_subset": None}
    changes = {"train": {"epochs": 1, "batch_size": 128, "evaluate_every": 0}}
    config = small_config(tmp_path / "run", data=data, **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run_training(config) is None
    replace_by_another(digits, "val")
    with pytest.raises(
        InputError, match=r"begun with other images.* one of the .* from val/7/\S+ on has"
    ) as e:
        run_training(config)
    assert str(config.run_dir) in str(e.value)
    assert "data.on_change=accept" in str(e.value)
    accepting = small_config(tmp_path / "run", data=data | {"on_change": "accept"}, **changes)
    assert run_training(accepting).images == 900
    assert run_training(config).images == 900  # what was accepted is remembered


def test_moved_data_are_the_same(small_config, digits, tmp_path):
    def at(root):
        return small_config(tmp_path / "run", data={"name": "folder", "root": str(root)})

    config = at(digits)
    config.run_dir.mkdir()
    check_run_data(config, fingerprint(open_folder(digits)))  # begun before there was such a file
    write_run_data(config.run_dir, fingerprint(open_folder(digits)))
    moved = digits.rename(tmp_path / "moved")
    check_run_data(at(moved), fingerprint(open_folder(moved)))
    replace_by_another(moved, "train")
    with pytest.raises(InputError, match=rf"than {moved} holds: .*from train/7/"):
        check_run_data(at(moved), fingerprint(open_folder(moved)))


def test_other_names_are_never_accepted(small_config, digits, tmp_path):
    data = {"name": "folder", "root": str(digits), "on_change": "accept"}
    config = small_config(tmp_path / "run", data=data)
    config.run_dir.mkdir()
    write_run_data(config.run_dir, fingerprint(open_folder(digits)))
    next(digits.glob("train/0/*.png")).unlink()
    with pytest.raises(InputError, match="train has 897 images there and 896 here") as error:
        check_run_data(config, fingerprint(open_folder(digits)))
    assert "accept" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"train": 1}', "{", '{"train": {"images": 1, "sections": [3]}}', "[" * 100_000]
)
def test_a_damaged_file_is_refused_by_name(small_config, digits, tmp_path, content):
    config = small_config(tmp_path / "run", data={"name": "folder", "root": str(digits)})
    config.run_dir.mkdir()
    (config.run_dir / FILE_NAME).write_text(content)
    with pytest.raises(InputError, match=rf"{FILE_NAME} is damaged"):
        check_run_data(config, fingerprint(open_folder(digits)))
