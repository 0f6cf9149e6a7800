"""Tiny ONNX classifiers, written without torch: the mean of each channel, then a linear layer."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdav_fast.config import DataConfig
from kdav_fast.student.file import StudentCard

WEIGHT = np.arange(30, dtype=np.float32).reshape(10, 3) / 10 - 1
BIAS = np.linspace(-1, 1, 10, dtype=np.float32)


def card(**changes) -> StudentCard:
    """Of the digits at 8 pixels."""
    fields = {
        "name": "cifar:resnet8",
        "width": 1.0,
        "classes": tuple("0123456789"),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "data": DataConfig(image_size=8, crop="none"),
        "distiller": "none",
        "step": 4,
        "epoch": 2.0,
        "steps": 4,
    }
    return StudentCard(**(fields | changes))


def write_onnx(
    path: Path, metadata: dict[str, str], batch: int | str = "n", size: int | str = 8, external: bool = False
) -> Path:
    """`images` batch x 3 x size x size to `logits` batch x 10."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(BIAS, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def truth(images: np.ndarray) -> np.ndarray:
    """The same in NumPy."""
    return images.mean((2, 3)) @ WEIGHT.T + BIAS
