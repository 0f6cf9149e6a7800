"""The deployable student: stock architecture, stock weights, nothing of the distillation left."""

import os
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdav_fast.checkpoint.manifest import FOLDER_NAME
from kdav_fast.errors import InputError
from kdav_fast.models import build_stock
from kdav_fast.runtime.files import write_whole
from kdav_fast.student.file import (
    CHECKPOINTS,
    FILE_NAME,
    StudentCard,
    find_student_file,
    read_student,
    student_bytes,
)
from kdav_fast.student.onnx_file import REMEDY, is_onnx, onnx_metadata, read_onnx
from kdav_fast.student.student import Student

Format = Literal["safetensors", "onnx"]
FORMATS: tuple[Format, ...] = ("safetensors", "onnx")
_LARGEST_ONNX = 2**31 - 1  # bytes of one protobuf message


class Exported(NamedTuple):
    """What was written."""

    output: Path
    difference: float | None
    """Largest difference of its scores from the trained student's, as a share of the largest score, on random
    images; None where nothing here can run the file."""
    note: str
    """That its run was not at its end, and where; empty if it was."""


def export(source: Path, output: Path | None = None, format: Format | None = None) -> Exported:
    """Write a student in the stock architecture.

    Args:
        source: a run, a checkpoint folder or a student file.
        output: the file to write. Default: `student.FORMAT` in the run's `export/`, or beside the source's file.
        format: default: what the suffix of `output` says, else safetensors.

    Raises:
        InputError: the source or the output cannot be used, suffix and format contradict each other, or, for ONNX,
            the export libraries are missing or the network cannot be expressed.
    """
    if output and output.is_dir():
        raise InputError(f"--output {output} is a folder; give a file, such as {output / 'student.onnx'}")
    format = chosen_format(output, format)
    if is_onnx(source):
        raise InputError(
            f"{source} is an ONNX file, from which no weights can be exported; give the run, or a safetensors file"
        )
    file = find_student_file(source)
    output = output or _default_folder(file) / f"student.{format}"
    _check_output(output, file)
    student, card = read_student(source)
    write = _write_onnx if format == "onnx" else _write_safetensors
    return Exported(output, write(student, card, output), card.unfinished(file))


def chosen_format(output: Path | None, format: Format | None) -> Format:
    """The format that a suffix and `--format` mean together; raises `InputError` if they contradict each other."""
    suffix = output.suffix.lower() if output else ""
    meant = next((name for name in FORMATS if suffix == f".{name}"), None)
    if format and meant and format != meant:
        raise InputError(
            f"--format is '{format}' but --output {output} ends in {suffix}; give one of them, or the same in both"
        )
    if output and not (format or meant):
        raise InputError(
            f"--output {output} ends in neither .safetensors nor .onnx; give one of these, or --format too"
        )
    return format or meant or "safetensors"


def export_safetensors(source: Path, output: Path) -> float:
    """Write weights that `build_stock`'s network loads with `strict=True`; returns `Exported.difference`."""
    return export(source, output, "safetensors").difference


def export_onnx(source: Path, output: Path) -> float | None:
    """Write ONNX, from `images`, N x 3 x S x S, normalised, to `logits`, N x K, for any N; returns
    `Exported.difference`. The file's metadata (`onnx_metadata`) says what its input is and what the classes are."""
    return export(source, output, "onnx").difference


def _write_safetensors(student: Student, card: StudentCard, output: Path) -> float:
    stock = _stock(student, card)
    _write(output, student_bytes(stock.state_dict(), card))
    return _difference(student, stock, card)


def _write_onnx(student: Student, card: StudentCard, output: Path) -> float | None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX export needs the package {error.name}; {REMEDY}") from None
    stock = _stock(student, card)
    try:
        with _quiet():
            program = torch.onnx.export(
                stock,
                (_random_images(card),),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        model = program.model_proto
        for key, value in onnx_metadata(card).items():
            model.metadata_props.add(key=key, value=value)
        size = model.ByteSize()
        if size <= _LARGEST_ONNX:
            onnx.checker.check_model(model)
    except Exception as error:  # the exporter and what it calls have no common class for their errors
        raise InputError(
            f"{card.name} cannot be exported as ONNX ({_reason(error)}); use --format safetensors"
        ) from None
    if size > _LARGEST_ONNX:
        raise InputError(
            f"{card.name} has {size / 2**30:.1f} GiB, but one ONNX file holds 2 at most; use --format safetensors"
        )
    _write(output, model.SerializeToString())
    try:
        network, _ = read_onnx(output)
    except InputError:
        return None
    return _difference(student, lambda images: network(images).logits, card)


def _check_output(output: Path, source: Path) -> None:
    """Raise `InputError` if writing `output` would damage something."""
    if output.exists() and not stat.S_ISREG(output.stat().st_mode):
        raise InputError(f"--output {output} is no regular file; give the name of a file")
    if output.exists() and output.samefile(source):
        raise InputError(f"--output {output} is the file to be exported; give another name")
    home = output.resolve().parent
    in_checkpoint = FOLDER_NAME.fullmatch(home.name) and home.parent.name == CHECKPOINTS
    if in_checkpoint or (output.name == FILE_NAME and (home / "config.yaml").exists()):
        raise InputError(
            f"--output {output} is a part of a run, which could not be continued any more; give another name, such as "
            f"{home / 'export' / output.name}"
        )


def _default_folder(file: Path) -> Path:
    """`export/` of the run that a file belongs to, or beside the file."""
    folder = file.parent
    if FOLDER_NAME.fullmatch(folder.name) and folder.parent.name == CHECKPOINTS:
        folder = folder.parent.parent
    return folder if folder.name == "export" else folder / "export"


def _write(output: Path, content: bytes) -> None:
    """The old file or the new one, whatever happens; a link keeps its place."""
    try:
        write_whole(Path(os.path.realpath(output)), content)
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be written: {error.strerror}; give a file that can be written"
        ) from None


def _stock(student: Student, card: StudentCard) -> nn.Module:
    stock = build_stock(card.name, len(card.classes), width=card.width, arguments=card.arguments)
    stock.load_state_dict(student.weights(), strict=True)
    return stock.eval().requires_grad_(False)


@torch.no_grad()
def _difference(student: Student, exported: Callable[[Tensor], Tensor], card: StudentCard) -> float:
    images = _random_images(card)
    trained = student(images).logits
    return float((exported(images) - trained).abs().max() / trained.abs().max())


def _random_images(card: StudentCard) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, card.data.image_size, card.data.image_size, generator=generator)


class _quiet(warnings.catch_warnings):  # noqa: N801 - a context manager
    """Without the deprecation that torch's exporter sets off in torch itself, whatever it is asked to export."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)


def _reason(error: Exception) -> str:
    """The cause of an exporter's error, of whose many lines the first says that it failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
