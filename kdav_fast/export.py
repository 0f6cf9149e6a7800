"""The deployable student: stock architecture, stock weights, nothing of the distillation left."""

from pathlib import Path

import torch
from torch import Tensor, nn

from kdav_fast.errors import InputError
from kdav_fast.models import build_stock
from kdav_fast.student import Student
from kdav_fast.student_file import StudentCard, read_student, write_student

ONNX_REMEDY = "install the export libraries with: pip install 'kdav_fast[onnx]'"


def export_safetensors(source: Path, output: Path) -> float:
    """Fold a run's student into its stock architecture and write it with its card.

    Args:
        source: a run, a checkpoint folder or a student file.
        output: the file to write; `build_stock` loads it with `strict=True`.

    Returns:
        Largest difference of the folded network's scores from the trained one's, as a share of the largest
        score, on random images.
    """
    student, card = read_student(source)
    stock = _stock(student, card)
    error = _difference(student, stock, card)
    write_student(output, stock.state_dict(), card.model_copy(update={"embedding_width": None}))
    return error


def export_onnx(source: Path, output: Path) -> None:
    """Write the folded student as ONNX: `images` N x 3 x S x S, normalised, to `logits` N x K; any N.

    Raises:
        InputError: the export libraries are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX export needs the package {error.name}; {ONNX_REMEDY}") from None
    student, card = read_student(source)
    stock = _stock(student, card)
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        stock,
        (_random_images(card),),
        str(output),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _stock(student: Student, card: StudentCard) -> nn.Module:
    stock = build_stock(card.name, len(card.classes), width=card.width)
    stock.load_state_dict(student.deployed(), strict=True)
    return stock.eval()


@torch.no_grad()
def _difference(student: Student, stock: nn.Module, card: StudentCard) -> float:
    images = _random_images(card)
    trained, folded = student(images).logits, stock(images)
    return float((folded - trained).abs().max() / trained.abs().max())


def _random_images(card: StudentCard) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, card.data.image_size, card.data.image_size, generator=generator)
