import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdav_fast.data.sources.tar_shards import open_evaluation_shards, open_shards
from tests.data.sources.small_shards import (
    BLOCK,
    FORMATS,
    contents,
    images_of,
    sample,
    write_dali_index,
    write_data_set,
    write_shard,
)


@pytest.fixture
def root(tmp_path):
    return write_data_set(tmp_path / "shards")


@pytest.fixture
def no_scan(monkeypatch):
    """Reading tar headers fails from the call on."""

    def forbid():
        def fail(*args, **options):
            raise AssertionError("a tar was scanned")

        monkeypatch.setattr(tarfile, "open", fail)

    return forbid


def test_fields_are_told_by_what_follows_the_first_dot(tmp_path):
    files = [
        ("x.1/k.seg.png", b"a mask"),
        ("x.1/k.json", b"{}"),
        ("x.1/k.JPEG", b"the image"),
        ("x.1/k.png", b"a second image"),
        ("x.1/._k.cls", b"of another file system"),
        ("x.1/k.cls", b" 007\n"),
        ("README", b"no field"),
        ("y/k.cls", b"1"),
        ("y/k.webp", b"label first"),
    ]
    write_shard(tmp_path / "test-0.tar", files)
    images = open_evaluation_shards(tmp_path, tuple("abcdefgh"))
    assert images_of(images) == {"test-0.tar/x.1/k.JPEG": b"the image", "test-0.tar/y/k.webp": b"label first"}
    assert images.labels.tolist() == [7, 1]


def test_only_regular_files_are_members(tmp_path):
    with tarfile.open(tmp_path / "val-0.tar", "w") as tar:
        for name, kind in (("f.cls", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "f.cls"
            tar.addfile(header)
        for name, content in sample("a", 0):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    assert list(images_of(open_evaluation_shards(tmp_path, ("x",)))) == ["val-0.tar/a.jpg"]


@pytest.mark.parametrize(
    ("key", "form"),
    [
        (f"{'d' * 90}/{'n' * 90}", "ustar"),
        (f"{'d' * 90}/{'n' * 90}", "gnu"),
        ("d" * 300, "pax"),
        ("ä/ö ü", "ustar"),
        ("ä/ö ü", "pax"),
        ("\udcff", "gnu"),
    ],
)
def test_names_of_every_kind(tmp_path, no_scan, key, form):
    path = write_shard(tmp_path / "val-0.tar", sample(key, 0) + sample("short", 1), form)
    truth = contents(path)
    images = open_evaluation_shards(tmp_path, ("x", "y"))
    no_scan()
    for opened in (images, open_evaluation_shards(tmp_path, ("x", "y"))):  # the second is from the cache
        assert images_of(opened) == {f"val-0.tar/{k}.jpg": truth[f"{k}.jpg"] for k in (key, "short")}
        assert opened.digest == images.digest


@settings(max_examples=30, deadline=None)
@given(
    shards=st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 2000),
                st.sampled_from(("jpg", "PNG", "tiff")),
                st.integers(0, 20),
                st.lists(st.sampled_from(("json", "txt", "seg.jpg")), unique=True),
                st.integers(0, 99),
            ),
            min_size=1,
            max_size=8,
        ),
        min_size=1,
        max_size=4,
    ),
    form=st.sampled_from(sorted(FORMATS)),
    indexed=st.booleans(),
)
def test_any_shards_give_what_tarfile_extracts(shards, form, indexed):
    with tempfile.TemporaryDirectory() as folder:
        names, labels, extracted = [], [], []
        for number, samples in enumerate(shards):
            files, members = [], []
            for i, (size, field, label, extra, seed) in enumerate(samples):
                order = random.Random(seed)
                key = f"s{number}/{i:03d}"
                parts = [(f"{key}.{field}", order.randbytes(size)), (f"{key}.cls", b"%d" % label)]
                parts += [(f"{key}.{name}", order.randbytes(600)) for name in extra]
                order.shuffle(parts)
                files += parts
                members.append([name for name, _ in parts])
                names.append(f"test-{number}.tar/{key}.{field}")
                labels.append(label)
            path = write_shard(Path(folder, f"test-{number}.tar"), files, form)
            extracted.append(contents(path))
            if indexed:
                write_dali_index(path, members)
        images = open_evaluation_shards(Path(folder), tuple(map(str, range(21))))
        assert [images.name(i) for i in range(len(images))] == names
        assert images.labels.tolist() == labels
        for i, name in enumerate(names):
            shard, _, member = name.partition("/")
            truth = extracted[int(shard[5:-4])][member]
            assert images.read(i).tobytes() == truth
            with images.open(i) as file:
                assert file.read() == truth


# DALI's index


def test_the_dali_index_is_used_and_needs_no_scan(root, no_scan):
    for shard, keys in (("train-0000", "b"), ("train-0001", "cd"), ("val-0000", "e")):
        write_dali_index(root / f"{shard}.tar", [[f"{key}.jpg", f"{key}.cls"] for key in keys])
    no_scan()
    train, evaluation = open_shards(root)
    assert images_of(train) == {
        "train-0000.tar/b.jpg": b"image b",
        "train-0001.tar/c.jpg": b"image c",
        "train-0001.tar/d.jpg": b"image d",
    }
    assert train.labels.tolist() == [0, 1, 2]
    assert evaluation.labels.tolist() == [2]


def _edit(old, new):
    return lambda index: index.write_text(index.read_text().replace(old, new))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: os.utime(index, ns=(0, 0)),
        _edit("v1.2", "v1.1"),
        _edit("v1.2 1", "v1.2 2"),
        _edit("v1.2 1", "1"),
        _edit("v1.2 1\n", ""),
        _edit("a.jpg cls", "a b.jpg cls"),
        _edit("cls 1536 1", "cls 1536 2"),
        _edit("cls 1536 1", "cls 1024 1"),
        _edit("jpg 512", "jpg 0"),
        _edit("jpg 512", "jpg -512"),
        _edit("jpg 512", f"jpg {10**30}"),
        _edit("jpg 512", "jpg x"),
        _edit("a.cls", "a.cl"),
        _edit(" a.cls", ""),
        _edit("a.", "\\303\\244."),
        lambda index: index.write_bytes(b"\xff\0" * 50),
        lambda index: index.write_bytes(b""),
        lambda index: (index.unlink(), index.mkdir()),
    ],
)
def test_a_dali_index_that_cannot_be_trusted_is_passed_over(root, spoil):
    (root / "train-0001.tar").unlink()
    (root / "classes.txt").write_text("a\nb\nc\nd")
    index = write_dali_index(root / "train-0000.tar", [["a.jpg", "a.cls"]])
    before = index.read_bytes()
    spoil(index)
    assert index.is_dir() or index.stat().st_mtime_ns == 0 or index.read_bytes() != before
    assert len(open_shards(root)[0]) == 2


def test_an_extended_header_is_not_taken_for_an_image(tmp_path):
    """In a GNU tar, `wds2idx` says that an image lies where its long name does."""
    name = f"{'n' * 200}.jpg"
    image = bytes(len(name) + 1)  # as long as the name with its end, which is what that header tells
    path = write_shard(tmp_path / "val-0.tar", sample("n" * 200, 0, image), "gnu")
    index = write_dali_index(path, [[name, f"{'n' * 200}.cls"]])
    index.write_text(index.read_text().replace(f"jpg {3 * BLOCK} ", f"jpg {BLOCK} "))
    assert f"jpg {BLOCK} {len(image)} n" in index.read_text()
    assert images_of(open_evaluation_shards(tmp_path, ("x",))) == {f"val-0.tar/{name}": image}


def test_a_dali_index_that_was_remade_is_read_again(root):
    (root / "classes.txt").write_text("a\nb\nc\nd")
    index = write_dali_index(root / "train-0000.tar", [["a.jpg", "a.cls"]])
    assert len(open_shards(root)[0]) == 3
    write_dali_index(root / "train-0000.tar", [["a.jpg", "a.cls"], ["b.jpg", "b.cls"]])
    assert len(open_shards(root)[0]) == 4
    index.unlink()
    assert len(open_shards(root)[0]) == 4


@pytest.mark.parametrize("form", sorted(FORMATS))
@pytest.mark.parametrize("long", [False, True])
def test_what_wds2idx_itself_writes(tmp_path, no_scan, form, long):
    pytest.importorskip("wds2idx", reason="comes with DALI")
    key = f"{'d' * 90}/{'n' * 60}" if long else "d/n"
    path = write_shard(tmp_path / "val-0.tar", sample(key, 1) + sample("b", 0), form)
    subprocess.run([sys.executable, "-m", "wds2idx", path], check=True, capture_output=True)
    assert path.with_suffix(".idx").read_text().startswith("v1.2 2\n")
    truth = contents(path)
    if not (form == "gnu" and long):  # there wds2idx points at the extended header, and the tar is scanned
        no_scan()
    images = open_evaluation_shards(tmp_path, ("x", "y"))
    assert images_of(images) == {f"val-0.tar/{k}.jpg": truth[f"{k}.jpg"] for k in (key, "b")}
    assert images.labels.tolist() == [1, 0]


# The cache


def test_the_second_start_reads_no_tar_header(root, cache, no_scan):
    first = open_shards(root)
    assert len(list((cache / "tar-index").glob("*.npz"))) == 3
    no_scan()
    for one, again in zip(first, open_shards(root), strict=True):
        assert images_of(one) == images_of(again)
        assert one.labels.tolist() == again.labels.tolist()
        assert (one.digest, one.classes) == (again.digest, again.classes)


def test_a_changed_shard_is_indexed_again(root):
    open_shards(root)
    changed = write_shard(root / "train-0000.tar", sample("a", 1, b"other a") + sample("b", 0))
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1))
    train, _ = open_shards(root)
    assert train.labels[0] == 1
    assert train.read(0).tobytes() == b"other a"


def _npz(**columns):
    content = io.BytesIO()
    np.savez(content, **columns)
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing that numpy wrote",
        b"PK\x03\x04" + bytes(50),
        _npz(members=np.zeros(1, np.uint8)),
        _npz(members=np.zeros(4, np.uint8), offsets=np.zeros(2), sizes=np.zeros(2), labels=np.zeros(2)),
        _npz(members=np.array(["pickled"], object)),
    ],
)
def test_a_damaged_cache_is_made_again(root, cache, no_scan, content):
    first = open_shards(root)[0]
    for record in (cache / "tar-index").iterdir():
        record.write_bytes(content)
    assert images_of(open_shards(root)[0]) == images_of(first)
    no_scan()
    assert images_of(open_shards(root)[0]) == images_of(first)


def test_without_a_cache_the_shards_open_all_the_same(root, cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder would be")
    assert len(open_shards(root)[0]) == len(open_shards(root)[0]) == 4
