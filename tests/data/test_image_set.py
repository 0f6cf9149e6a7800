import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdav_fast.data.image_set import ByteRange, PixelImages, is_utf8, printable, take_subset
from kdav_fast.errors import InputError


@pytest.fixture
def pixel_images(tmp_path):
    def make(count=5, split="test", root=tmp_path):
        pixels = torch.arange(count * 2 * 4 * 3).reshape(count, 2, 4, 3).to(torch.uint8)
        return PixelImages(root, split, ("a", "b"), np.arange(count) % 2, pixels)

    return make


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


def test_two_subsets_one_after_the_other_share_nothing(numbered_split):
    folder = numbered_split(12)
    first, second = take_subset(folder, 7, seed=1), take_subset(folder, 5, seed=1, after=7)
    assert sorted(first.paths + second.paths) == list(folder.paths)
    with pytest.raises(
        InputError, match="is 6 but the train images in .* are 12, 7 of them in another subset"
    ):
        take_subset(folder, 6, seed=1, after=7)


def test_subset_of_pixels_takes_the_same_positions(numbered_split, pixel_images):
    positions = [int(path[-8:-4]) for path in take_subset(numbered_split(12), 5, seed=3).paths]
    images = pixel_images(12)
    assert torch.equal(take_subset(images, 5, seed=3).pixels, images.pixels[positions])


def test_subset_larger_than_the_set_is_refused(numbered_split, pixel_images):
    with pytest.raises(
        InputError, match=r"data\.train_subset is 4 but the train images in .* are 3; lower it"
    ):
        take_subset(numbered_split(3), 4, seed=0)
    with pytest.raises(InputError, match=r"the test images in"):
        take_subset(pixel_images(3), 4, seed=0)


def test_files_are_selected_in_the_given_order(numbered_split):
    folder = numbered_split(4)
    chosen = folder.select(np.array([3, 0, 3]))
    assert chosen.paths == ("train/0003.png", "train/0000.png", "train/0003.png")
    assert chosen.labels.tolist() == [0, 0, 0]
    assert (chosen.root, chosen.split, chosen.classes) == (folder.root, folder.split, folder.classes)
    assert [chosen.name(i) for i in range(len(chosen))] == list(chosen.paths)
    assert len(folder.select(np.array([], np.int64))) == 0


def test_digest_of_files_follows_names_labels_and_order(numbered_split):
    folder = numbered_split(4)
    digests = {
        folder.select(np.array(order)).digest for order in ([0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 2], [0])
    }
    assert len(digests) == 4
    assert folder.select(np.arange(4)).digest == folder.digest


def test_files_are_read_opened_and_signed(numbered_split):
    folder = numbered_split(3)
    path = folder.root / folder.paths[2]
    content = path.read_bytes()
    assert folder.read(2).dtype == np.uint8
    assert folder.read(2).tobytes() == content
    with folder.open(2) as file:
        assert (file.tell(), file.read(4), file.tell()) == (0, content[:4], 4)
        assert (file.seek(1), file.read(2)) == (1, content[1:3])
    signature = folder.signature(2)
    assert folder.signature(2) == signature
    os.utime(path, ns=(0, 7))
    assert folder.signature(2) == f"{len(content)} 7"
    path.write_bytes(b"")
    assert folder.read(2).size == 0
    path.unlink()
    for use in (folder.open, folder.read, folder.signature):
        with pytest.raises(FileNotFoundError):
            use(2)


def test_pixels_are_selected_in_the_given_order(pixel_images):
    images = pixel_images()
    chosen = images.select(np.array([4, 1, 4]))
    assert torch.equal(chosen.pixels, torch.stack([images.pixels[i] for i in (4, 1, 4)]))
    assert chosen.labels.tolist() == [0, 1, 0]
    assert (chosen.root, chosen.split, chosen.classes) == (images.root, images.split, images.classes)
    assert (len(images), len(chosen)) == (5, 3)
    assert images.name(3) == "test image 3"


def test_digest_of_pixels_follows_pixels_labels_and_order_but_not_the_place(pixel_images, tmp_path):
    images = pixel_images()
    assert pixel_images(root=tmp_path / "elsewhere").digest == images.digest
    changed = pixel_images()
    changed.pixels[2, 1, 1, 0] += 1
    relabelled = pixel_images()
    relabelled.labels[0] = 1
    others = [changed, relabelled, images.select(np.array([1, 0, 2, 3, 4])), images.select(np.arange(4))]
    assert len({images.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/ö/鳥.png", "train/ö/鳥.png"),
        ("a\udcff\udc80.png", r"a\xff\x80.png"),
        ("\udcc3(", r"\xc3("),
        ("", ""),
        ("a\tb\nc", r"a\x09b\x0ac"),
    ],
)
def test_printable_names_survive_any_encoder(name, expected):
    assert printable(name) == expected
    printable(name).encode("utf-8")


@given(st.binary())
def test_every_file_name_is_printable_and_what_can_stays(content):
    name = content.decode("utf-8", "surrogateescape")
    shown = printable(name)
    shown.encode("utf-8")
    assert (shown == name) == (is_utf8(name) and min(content, default=32) >= 32)
    assert is_utf8(name) == (content == content.decode("utf-8", "ignore").encode())


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 30)),
        st.tuples(st.just("readinto"), st.integers(0, 30)),
        st.tuples(st.just("seek"), st.integers(0, 30)),
        st.tuples(st.just("forward"), st.integers(0, 10)),
        st.tuples(st.just("back"), st.integers(0, 10)),
        st.tuples(st.just("from end"), st.integers(-20, 10)),
    ),
    max_size=12,
)


@given(st.binary(max_size=40), st.integers(0, 40), st.integers(0, 40), _STEPS)
def test_a_byte_range_behaves_as_a_file_of_its_own(content, start, size, steps):
    expected = io.BytesIO(content[start : start + size])
    length = len(expected.getvalue())
    file = ByteRange(io.BytesIO(content), start, length)
    for step, amount in steps:
        if step == "read":
            assert file.read(amount) == expected.read(amount)
        elif step == "readinto":
            buffers = bytearray(amount), bytearray(amount)
            assert file.readinto(buffers[0]) == expected.readinto(buffers[1])
            assert buffers[0] == buffers[1]
        elif step == "seek":
            assert file.seek(amount) == expected.seek(amount)
        elif step == "from end":
            back = max(amount, -length)  # before the start there is nothing
            assert file.seek(back, io.SEEK_END) == expected.seek(back, io.SEEK_END)
        else:
            move = amount if step == "forward" else -min(amount, expected.tell())
            assert file.seek(move, io.SEEK_CUR) == expected.seek(move, io.SEEK_CUR)
        assert file.tell() == expected.tell()


def test_a_byte_range_is_readable_seekable_and_closes_its_file():
    content = io.BytesIO(b"0123456789")
    with ByteRange(content, 2, 5) as file:
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert file.readall() == b"23456"
        assert not content.closed
    assert content.closed
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_a_byte_range_of_a_file_cut_short_ends_with_it():
    assert ByteRange(io.BytesIO(b"0123"), 2, 50).read() == b"23"


@pytest.mark.parametrize(("offset", "whence"), [(-1, io.SEEK_SET), (-1, io.SEEK_CUR), (-6, io.SEEK_END)])
def test_a_byte_range_does_not_reach_before_its_start(offset, whence):
    file = ByteRange(io.BytesIO(b"0123456789"), 2, 5)
    with pytest.raises(ValueError, match="negative seek value"):
        file.seek(offset, whence)
    assert file.read() == b"23456"
