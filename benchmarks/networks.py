"""Every architecture of timm and torchvision, tried as teacher and as student: the table in `docs/networks.md`.

    python benchmarks/networks.py

Each is built with new weights, classifies small images, and takes one step forward and backward in training. It goes on
where it was stopped; --again tries anew what is in the table.
"""

import argparse
import csv
import multiprocessing
import multiprocessing.connection
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision
from networks_page import networks_page
from tqdm import tqdm

from kdav_fast.errors import InputError, one_line
from kdav_fast.models import ImageClassifier, build_classifier
from kdav_fast.models.arguments import sketch
from kdav_fast.models.stock import build_stock
from kdav_fast.student.heads import EmbeddingHead
from kdav_fast.student.student import Student

DOCS = Path(__file__).parents[1] / "docs"
CLASSES = 7
SIZES = (64, 128, 224)
"""Sides of images; the smallest that a network takes keeps the trial short."""


class Row(NamedTuple):
    """What is known of an architecture. Answers are "yes", "no" or, where it was not tried, ""."""

    name: str
    image_size: str
    """Its own."""
    parameters: str
    """Millions, with 1000 classes."""
    sizes: str
    """Image sizes: "any", "told" (any that it can be built for, which happens by itself), or "own"."""
    head: str
    """Its layers; "" where the class scores are no fixed linear function of pooled features."""
    teacher: str
    """The methods for which it can teach."""
    student: str
    """The methods from which it can learn."""
    why: str
    """Why not all of them."""


def names() -> list[str]:
    """Every architecture, as the config names it."""
    vision = torchvision.models.list_models(module=torchvision.models)
    return [f"timm:{name}" for name in timm.list_models()] + [f"torchvision:{name}" for name in vision]


def try_network(name: str, most_parameters: float) -> Row:
    """Try an architecture.

    Args:
        most_parameters: millions, beyond which it is only counted.
    """
    own, millions = _counted(name)
    row = Row(name, str(own), f"{millions:.1f}", "", "", "", "", "")
    if millions > most_parameters:
        return row._replace(
            why=f"not tried: {millions:.0f} million parameters are too many for the machine it ran on"
        )
    try:
        network, size = _smallest(name, own)
    except InputError as error:
        return row._replace(teacher="no", student="no", why=str(error))
    told = any(key in network.facts.arguments for key in ("img_size", "image_size", "input_size"))
    row = row._replace(
        sizes="told" if told else "own" if size == own else "any", head=" + ".join(network.head_paths)
    )
    teacher = "all" if network.classifier else "kd, kdav" if network.feature_width else "kd"
    student, why = (
        "kd",
        "" if network.classifier else "class scores are no fixed linear function of pooled features",
    )
    if network.classifier:
        try:
            head = EmbeddingHead(network.feature_width, 5, CLASSES)
            head.observe(torch.randn(CLASSES, 5), torch.arange(CLASSES))
            Student(network, head).weights()
            student = "all"
        except InputError as error:
            why = str(error)
    try:
        _train(network, size)
    except Exception as error:  # whatever a library's layers raise
        student, why = "no", f"in training: {one_line(error)}"
    return row._replace(teacher=teacher, student=student, why=why)


def _counted(name: str) -> tuple[int, float]:
    """Own image size and millions of parameters with 1000 classes."""
    network = sketch(lambda: build_stock(name, 1000))
    family, _, architecture = name.partition(":")
    if family == "timm":
        size = network.pretrained_cfg["input_size"][-1]
    else:
        size = torchvision.models.get_model_weights(architecture).DEFAULT.transforms().crop_size[0]
    return size, sum(parameter.numel() for parameter in network.parameters()) / 1e6


def _smallest(name: str, own: int) -> tuple[ImageClassifier, int]:
    """The network for the smallest images that it takes."""
    for size in (size for size in SIZES if size < own):
        try:
            return build_classifier(name, CLASSES, image_size=size), size
        except InputError:
            continue
    return build_classifier(name, CLASSES, image_size=own), own


def _train(network: ImageClassifier, size: int) -> None:
    """A step forward and backward."""
    Student(network).train()(torch.randn(2, 3, size, size)).logits.square().mean().backward()


def _with_short_start() -> None:
    """The same few random numbers for every weight: the careful ones take longer than all else of a large network."""
    noise = torch.empty(2**16).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def start(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 1.0
        for stretch in tensor.view(-1).split(len(noise)):
            stretch.copy_(noise[: len(stretch)] * scale)
        return tensor

    for name in ("_no_grad_trunc_normal_", "_no_grad_normal_", "_no_grad_uniform_", "kaiming_uniform_"):
        setattr(torch.nn.init, name, start)
    torch.nn.init.kaiming_normal_ = start
    timm.layers.weight_init._trunc_normal_ = start


def _work(pipe: multiprocessing.connection.Connection, most_parameters: float) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _with_short_start()
    with suppress(EOFError):  # the end of the list
        while True:
            pipe.send(try_network(pipe.recv(), most_parameters))


def try_all(wanted: list[str], most_parameters: float, seconds: float) -> Iterator[Row]:
    """Rows of architectures, tried in a process of their own: one that crashes or hangs is a row too."""
    context = multiprocessing.get_context("spawn")
    process = None
    for name in wanted:
        if process is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, most_parameters), daemon=True)
            process.start()
            theirs.close()
        try:
            pipe.send(name)
            if not pipe.poll(seconds):
                raise EOFError
            yield pipe.recv()
        except (EOFError, OSError):
            process.kill()
            process.join()
            process = None
            yield Row(
                name, "", "", "", "", "", "", f"not tried: it took longer than {seconds:g} s or was ended"
            )


def read_rows(path: Path) -> list[Row]:
    """What is in the table so far."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def _write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    order = {name: place for place, name in enumerate(names())}
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Row._fields)
        table.writerows(sorted(rows, key=lambda row: order.get(row.name, len(order))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of networks.md and networks.csv")
    parser.add_argument(
        "--most", type=float, default=350.0, help="millions of parameters beyond which none is tried"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="longest trial of one architecture")
    parser.add_argument("--again", nargs="*", metavar="NAME", help="try these again; without names, all")
    options = parser.parse_args()
    file = options.output / "networks.csv"
    again = names() if options.again == [] else options.again or []
    rows = [row for row in read_rows(file) if row.name not in again]
    left = [name for name in names() if name not in {row.name for row in rows}]
    try:
        for row in tqdm(try_all(left, options.most, options.seconds), "networks", len(left)):
            rows.append(row)
            if len(rows) % 20 == 0:
                _write_rows(file, rows)
    finally:
        _write_rows(file, rows)
        page = options.output / "networks.md"
        page.write_text(networks_page(page.read_text(encoding="utf-8"), read_rows(file)), encoding="utf-8")


if __name__ == "__main__":
    main()
