"""Small archives in every published version of CIFAR and STL-10, written by hand."""

import io
import pickle
import struct
import tarfile

import numpy as np
import torch

CLASSES = {
    "cifar10": ("zebra", "airplane", "frog"),
    "cifar100": ("whale", "apple"),
    "stl10": ("ship", "bird", "car"),
}
COUNTS = {"train": 7, "test": 4}
BATCHES = np.array_split(np.arange(COUNTS["train"]), 5)
FOLDERS = {
    "cifar10": {
        "cifar-10-python.tar.gz": "cifar-10-batches-py",
        "cifar-10-binary.tar.gz": "cifar-10-batches-bin",
    },
    "cifar100": {
        "cifar-100-python.tar.gz": "cifar-100-python",
        "cifar-100-binary.tar.gz": "cifar-100-binary",
    },
    "stl10": {"stl10_binary.tar.gz": "stl10_binary"},
}
KINDS = [(name, archive) for name, archives in FOLDERS.items() for archive in archives]


def truth_of(name):
    """Pixels (N x H x W x 3) and labels of each split."""
    random = np.random.default_rng(len(name))
    side = 96 if name == "stl10" else 32
    truth = {}
    for split, count in COUNTS.items():
        pixels = random.integers(0, 256, (count, side, side, 3), np.uint8)
        truth[split] = pixels, np.arange(count)[::-1] % len(CLASSES[name])
    return truth


def _rows(pixels):
    """CIFAR's rows: all reds line by line, then all greens, then all blues."""
    return np.stack([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in pixels])


def _python2(value):
    """A pickle of protocol 2 as Python 2 writes it: its texts are bytes."""
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, np.ndarray):
        new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = (
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        )
        shape = b"J" + struct.pack("<i", value.shape[0]) + b"J" + struct.pack("<i", value.shape[1]) + b"\x86"
        content = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
        return new + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"
    return b"J" + struct.pack("<i", value)


def _pickled(value, protocol):
    return b"\x80\x02" + _python2(value) + b"." if protocol == "python 2" else pickle.dumps(value, protocol)


def files_of(name, archive, protocol="python 2"):
    """The files of a small archive, by name."""
    truth, classes = truth_of(name), CLASSES[name]
    if name == "stl10":
        files = {"class_names.txt": "\n".join(classes).encode() + b"\n", "unlabeled_X.bin": b"not read"}
        for split, (pixels, labels) in truth.items():
            # Column by column: of each plane, all of column 0 comes first.
            columns = [image[:, x, c].tobytes() for image in pixels for c in range(3) for x in range(96)]
            files[f"{split}_X.bin"] = b"".join(columns)
            files[f"{split}_y.bin"] = bytes((labels + 1).tolist())
        return files
    parts = {"train": truth["train"], "test": truth["test"]}
    if name == "cifar10":
        pixels, labels = truth["train"]
        parts = {f"data_batch_{i}": (pixels[at], labels[at]) for i, at in enumerate(BATCHES, 1)}
        parts["test_batch"] = truth["test"]
    if "binary" in archive:
        coarse = b"\x13" if name == "cifar100" else b""
        files = {
            f"{part}.bin": b"".join(
                coarse + bytes([label]) + row.tobytes()
                for row, label in zip(_rows(pixels), labels, strict=True)
            )
            for part, (pixels, labels) in parts.items()
        }
        text = "\n".join(classes).encode() + b"\n\n"
        return files | {"batches.meta.txt" if name == "cifar10" else "fine_label_names.txt": text}
    key = "labels" if name == "cifar10" else "fine_labels"
    files = {
        part: _pickled({"batch_label": part, key: labels.tolist(), "data": _rows(pixels)}, protocol)
        for part, (pixels, labels) in parts.items()
    }
    if name == "cifar10":
        meta = {"num_cases_per_batch": 10000, "label_names": list(classes), "num_vis": 3072}
        return files | {"batches.meta": _pickled(meta, protocol)}
    meta = {"fine_label_names": list(classes), "coarse_label_names": ["animals"]}
    return files | {"meta": _pickled(meta, protocol)}


def write_folder(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, folder, files, mode="w:gz"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        inside = tarfile.TarInfo(folder)
        inside.type = tarfile.DIRTYPE
        tar.addfile(inside)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def check(name, images, split, root):
    pixels, labels = truth_of(name)[split]
    assert images.split == split
    assert images.root == root
    assert images.classes == CLASSES[name]
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.is_contiguous()
    assert np.array_equal(images.pixels.numpy(), pixels)
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == labels.tolist()
