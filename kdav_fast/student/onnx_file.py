"""Exported students as ONNX files: what their metadata says, and how they answer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdav_fast.data.preprocessing import evaluation_preprocessing
from kdav_fast.errors import InputError, one_line
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.file import CARD_KEY, StudentCard, read_card

_GPU = "CUDAExecutionProvider"
REMEDY = "install it with: pip install 'kdav_fast[onnx]'"


def onnx_metadata(card: StudentCard) -> dict[str, str]:
    """What an exported file says about itself: the card as a whole, and what any reader needs, each under its name.

    Lists are JSON. Images are RGB, their short side resized to `resize` (antialiased bilinear), the middle
    `image_size` x `image_size` cut out, divided by 255, less `mean`, over `std`.
    """
    view = evaluation_preprocessing(card.data, card.normalization)
    return {
        CARD_KEY: card.model_dump_json(),
        "architecture": card.name,
        "classes": json.dumps(card.classes, ensure_ascii=False),
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
        "image_size": str(view.size),
        "resize": str(view.crop.resize),
        "crop": "center",
        "distiller": card.distiller,
        "step": str(card.step),
    }


def is_onnx(path: Path) -> bool:
    """By its name or its first bytes. A safetensors file of any name is none."""
    if not path.is_file():
        return path.suffix.lower() == ".onnx" and not path.is_dir()
    with path.open("rb") as file:
        head = file.read(9)
    # A protobuf message has no magic number; ONNX' begins with its version (field 1), a small number.
    return head[8:] != b"{" and (
        path.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and head[2:3] in b"\x12\x1a:")
    )


class OnnxStudent(nn.Module):
    """An ONNX file in the place of a network: it has no weights to train and computes in its own number format.

    Args:
        path: the file.
        session: of onnxruntime.
    """

    def __init__(self, path: Path, session: Any) -> None:
        super().__init__()
        self._path, self._session = path, session
        self._input, self._output = session.get_inputs()[0], session.get_outputs()[0]
        batch = self._input.shape[0] if self._input.shape else None
        self._batch = batch if isinstance(batch, int) else None

    def check(self, card: StudentCard, image_size: int) -> None:
        """Raise `InputError` unless it takes such images and scores the card's classes."""
        shape, scores = self._input.shape, self._output.shape
        fixed = [side for side in shape[2:] if isinstance(side, int)]
        if len(shape) != 4 or len(self._session.get_inputs()) != 1 or len(scores) != 2:
            raise InputError(
                f"{self._path} is no image classifier: it takes {shape} and gives {scores}; give a file that "
                "'kdav export' wrote"
            )
        if any(side != image_size for side in fixed):
            raise InputError(
                f"{self._path} takes images of {fixed[0]} pixels but data.image_size is {image_size}; use "
                f"data.image_size={fixed[0]}"
            )
        if isinstance(scores[1], int) and scores[1] != len(card.classes):
            raise InputError(
                f"{self._path} scores {scores[1]} classes but its metadata names {len(card.classes)}; export it again"
            )

    def device(self, wanted: str) -> str:
        """Where its images belong, "cpu" or "cuda"; raises `InputError` if this onnxruntime cannot use a GPU."""
        has_gpu = _GPU in self._session.get_providers()
        if wanted == "cuda" and not has_gpu:
            raise InputError(
                "device is 'cuda' but this onnxruntime knows no GPU; use device=cpu, or install onnxruntime-gpu"
            )
        return "cuda" if has_gpu and wanted != "cpu" else "cpu"

    def forward(self, images: Tensor) -> Outputs:
        """B x 3 x S x S images to logits, B x K, on the images' device. Of the features nothing is known."""
        halves = self._input.type == "tensor(float16)"
        given = images.detach().to("cpu", torch.float16 if halves else torch.float32).contiguous()
        if self._batch is None:
            parts = [given]
        else:
            missing = -len(given) % self._batch
            parts = torch.cat([given, given.new_zeros(missing, *given.shape[1:])]).split(self._batch)
        try:
            answers = [
                self._session.run([self._output.name], {self._input.name: part.numpy()})[0] for part in parts
            ]
        except Exception as error:  # onnxruntime has no common class for its errors
            raise InputError(f"{self._path} cannot be run: {one_line(error)}; export it again") from None
        logits = torch.cat([torch.from_numpy(answer) for answer in answers])[: len(images)]
        return Outputs(images.new_empty(len(images), 0), logits.to(images.device).float())


def read_onnx(path: Path) -> tuple[OnnxStudent, StudentCard]:
    """Open a file that `kdav export` wrote.

    Raises:
        InputError: no such file, onnxruntime is missing or cannot read it, or it carries no card.
    """
    if not path.is_file():
        raise InputError(f"ONNX file {path}: No such file or directory; give a file that 'kdav export' wrote")
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path} is an ONNX file, which needs the package onnxruntime; {REMEDY}") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions too
    available = onnxruntime.get_available_providers()
    wanted = [name for name in (_GPU, "CPUExecutionProvider") if name in available]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        metadata = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime has no common class for its errors
        raise InputError(
            f"{path} is no ONNX file that onnxruntime can read ({one_line(error)}); copy it again, with the file "
            "of its weights if it has one, or export it again"
        ) from None
    card = read_card(metadata, path)
    if card is None:
        raise InputError(
            f"{path} carries no '{CARD_KEY}' metadata, so its classes and the normalisation of its input are unknown; "
            "give a file that 'kdav export' wrote"
        )
    return OnnxStudent(path, session), card
