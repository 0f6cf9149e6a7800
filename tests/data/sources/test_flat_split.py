import codecs

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdav_fast.data.sources.flat_split import describe_label_files, find_label_file, read_labels
from kdav_fast.errors import InputError

IMAGES = ("val/a.png", "val/b.jpg", "val/c.JPEG")
CLASSES = ("n01", "n02", "n03")


@pytest.fixture
def read(tmp_path):
    def read(content, images=IMAGES, classes=CLASSES):
        path = tmp_path / "labels.txt"
        path.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
        )
        return read_labels(path, images, classes).tolist()

    return read


@pytest.mark.parametrize(
    "content",
    [
        "a.png n02\nb.jpg n01\nc.JPEG n03\n",
        "c.JPEG n03\na.png n02\nb.jpg n01",
        "\n a.png   n02 \n\n\tb.jpg\t\tn01\t\r\nc.JPEG , n03\r\n\n",
        "a.png n02\rb.jpg n01\rc.JPEG n03\r",
        "a.png\t1\nb.jpg\t0\nc.JPEG\t2\n",
        "a.png,01\nb.jpg,0\nc.JPEG,n03\n",
        "a n02\nb n01\nc n03\n",
        "val/a.png n02\n./b.jpg n01\nval/c n03\n",
        "a.png\tn02\t0\t32\t44\t62\nb.jpg\tn01\t52\t55\t57\t59\nc.JPEG\tn03\t4\t0\t60\t55\n",
        "ImageId,PredictionString\na,n02 1 2 3 4 n02 5 6 7 8 \nb,n01 85 1 499 272\r\nc,n03 1 2 3 4\n",
        codecs.BOM_UTF8 + b"a.png n02\nb.jpg n01\nc.JPEG n03\n",
        codecs.BOM_UTF8 + b"ImageId,PredictionString\r\na,n02 1 2 3 4\r\nb,n01 1 2 3 4\r\nc,n03 1 2 3 4\r\n",
    ],
)
def test_every_way_of_writing_says_the_same(read, content):
    assert read(content) == [1, 0, 2]


def test_labels_are_int64(tmp_path):
    (tmp_path / "labels").write_text("a.png n02")
    labels = read_labels(tmp_path / "labels", ("val/a.png",), CLASSES)
    assert labels.dtype == np.int64


def test_a_number_is_a_place_among_the_sorted_names(read):
    assert read("a.png 0\nb.jpg 1\nc.JPEG 2", classes=("n03", "n01", "n02")) == [1, 2, 0]


def test_a_number_is_a_name_where_classes_are_named_by_numbers(read):
    classes = ("1", "10", "2")
    assert read("a.png 10\nb.jpg 2\nc.JPEG 1", classes=classes) == [1, 2, 0]
    with pytest.raises(InputError, match=r"line 1: '0' is none of the 3 classes, such as '1'"):
        read("a.png 0\nb.jpg 2\nc.JPEG 1", classes=classes)


def test_names_with_blanks_and_commas(read):
    images = ("val/my cat, 1.png", "val/my dog.png")
    classes = ("cat, tabby", "great dane")
    assert read("my cat, 1.png\tcat, tabby\nmy dog.png\tgreat dane", images, classes) == [0, 1]
    assert read("my dog.png,great dane\nmy cat, 1\t0", images, classes) == [0, 1]
    assert read("my dog.png 1\nmy cat, 1\t0", images, classes) == [0, 1]


def test_names_that_are_no_utf_8(read):
    assert read(b"\xff\x80.png n02\n", ("val/\udcff\udc80.png",)) == [1]
    with pytest.raises(InputError, match=r"names '\\xfe\.png' but there is no such image"):
        read(b"\xff\x80.png n02\n\xfe.png n01\n", ("val/\udcff\udc80.png",))


def test_suffix_and_folder_tell_images_apart(read):
    images = ("val/1/a.jpg", "val/1/a.png", "val/2/a.png")
    assert read("a.jpg 2\n1/a.png 0\n2/a 1", images) == [2, 0, 1]
    with pytest.raises(InputError, match=r"line 2: several images are called 'a\.png'; add folder or suffix"):
        read("a.jpg 2\na.png 0\n2/a 1", images)
    with pytest.raises(InputError, match=r"line 1: several images are called '1/a'"):
        read("1/a 0", images)
    assert read("a.png 0\na.png.jpg 1", ("val/a.png", "val/a.png.jpg")) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a.png n02\nb.jpg n01\n",
            r"has no line for 'val/c\.JPEG'; add IMAGE CLASS lines or remove the images",
        ),
        ("", r"has no line for 'val/a\.png', 'val/b\.jpg', 'val/c\.JPEG'; add"),
        ("a.png n04\n", r"line 1: 'n04' is none of the 3 classes, such as 'n01'; correct"),
        ("\na.png 3\n", r"line 2: class 3 is out of range 0 to 2; count the sorted class names from 0"),
        ("a.png -1\n", r"line 1: class -1 is out of range 0 to 2"),
        ("a.png " + "9" * 5000, r"line 1: '9+ \.\.\. 9+' is none of the 3 classes"),
        (
            "a.png n01\r\n490\n361\n",
            r"line 2 is one column.*devkit's own order.*; give a file with image names",
        ),
        ("a.png,\n", r"line 1 is one column"),
        (",n01\n", r"line 1 is one column"),
        ("ImageId,PredictionString\na,\n", r"line 2 is one column"),
        ("0,a.png,n01\n", r"line 1 has 3 columns; write IMAGE CLASS, with a tab"),
        ("a.png\tn01\t1\n", r"line 1 has 3 columns"),
        (
            "d n01\ne.png n01\na.png n01\nf n01\ng n01\n",
            r"names 'd', 'e\.png', 'f' and 1 more but there is no",
        ),
        (
            "a.png n01\nb.jpg n02\na.png n01\n",
            r"line 3: 'a\.png' has a class from line 1 already; remove one",
        ),
        ("a.png n01\na n02\n", r"line 2: 'a' has a class from line 1 already"),
        ("a.png n01\rb.jpg n09\r", r"line 2: 'n09' is none"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", r"line 1 is one column"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(read, content, message):
    with pytest.raises(InputError, match=message) as error:
        read(content)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "gone.txt"):
        with pytest.raises(InputError, match=r"data\.val_labels .* is no file; give a text file with lines"):
            read_labels(path, IMAGES, CLASSES)


@pytest.mark.parametrize("levels", range(6))
def test_only_kaggles_file_is_looked_for_above(tmp_path, levels):
    root = tmp_path / "1/2/3/4/5"
    (root / "val").mkdir(parents=True)
    place = [root, *root.parents][levels]
    kaggle = place / "LOC_val_solution.csv"
    kaggle.touch()
    assert find_label_file(root, "val") == (kaggle if levels <= 3 else None)
    assert find_label_file(root, "test") is None
    kaggle.rename(place / "val.txt")
    assert find_label_file(root, "val") == (place / "val.txt" if levels == 0 else None)


def test_every_file_that_is_looked_for_is_told_and_comes_in_that_order(tmp_path):
    told = describe_label_files("val")
    (tmp_path / "val").mkdir()
    names = ["val/val_annotations.txt", "val/val.txt", "val/val_labels.txt", "val.txt", "val_labels.txt"]
    names.append("LOC_val_solution.csv")
    places = [told.index(f" {name}") for name in names]
    assert places == sorted(places)
    for name in reversed(names):
        (tmp_path / name).touch()
        assert find_label_file(tmp_path, "val") == tmp_path / name


_NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0\t\r\n", exclude_categories=["Cs"]), min_size=1
)


@given(
    stems=st.lists(_NAMES.map(str.strip).filter(bool), unique=True, max_size=8),
    classes=st.lists(_NAMES.map(str.strip).filter(bool), unique=True, min_size=1, max_size=5),
    data=st.data(),
)
def test_what_was_written_with_tabs_is_read(tmp_path_factory, stems, classes, data):
    images = tuple(sorted(f"val/{stem}.png" for stem in stems))
    labels = [data.draw(st.integers(0, len(classes) - 1)) for _ in images]
    lines = [f"{image}\t{classes[label]}\n" for image, label in zip(images, labels, strict=True)]
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_bytes("".join(data.draw(st.permutations(lines))).encode())
    assert read_labels(path, images, tuple(classes)).tolist() == labels
