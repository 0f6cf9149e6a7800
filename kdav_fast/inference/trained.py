"""A trained network from whatever a user names: a run, a checkpoint, a file of weights, an ONNX file."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kdav_fast.config import Config, DataConfig, apply_overrides, flat, known_keys, parse_config
from kdav_fast.errors import InputError
from kdav_fast.runtime.memory_format import set_layout
from kdav_fast.runtime.precision import autocast_dtype, check_image_dtype, has_bf16, resolve_precision
from kdav_fast.runtime.processes import Cluster, start_cluster
from kdav_fast.student.file import StudentCard, find_student_file, read_student
from kdav_fast.student.onnx_file import OnnxStudent, is_onnx, read_onnx

EFFECTIVE = frozenset(
    {"device", "train.batch_size", "train.precision"}
    | {f"data.{key}" for key in ("name", "root", "download", "val_labels", "skip_list", "max_pixels")}
    | {
        f"data.{key}"
        for key in (
            "loader",
            "decode",
            "hw_decoder_load",
            "fancy_upsampling",
            "workers",
            "check",
            "dtype",
            "layout",
        )
    }
    | {
        f"data.{key}" for key in ("image_size", "eval_resize", "crop")
    }  # the default of eval_resize follows crop
)
"""The config keys that an evaluation heeds; the others say how a run trains."""
ONNX_DECIDES = frozenset({"train.precision", "data.dtype", "data.layout"})
"""Those of them that an ONNX file has decided."""


class Trained(NamedTuple):
    """A network that answers images, and what is known of it."""

    network: nn.Module
    """In evaluation mode, on the CPU; its output has `logits`."""
    card: StudentCard
    file: Path
    """Where it lies."""

    @property
    def is_onnx(self) -> bool:
        return isinstance(self.network, OnnxStudent)

    @property
    def note(self) -> str:
        """What a reader of its results must know: that its run was not at its end; empty if it was."""
        return self.card.unfinished(self.file)


def open_trained(path: Path) -> Trained:
    """Read a run, a checkpoint, a file of `write_student`, or an ONNX file of `kdav export`.

    Raises:
        InputError: as in `read_student` and `read_onnx`.
    """
    if is_onnx(path):
        return Trained(*read_onnx(path), path)
    return Trained(*read_student(path), find_student_file(path))


def inference_config(trained: Trained, overrides: list[str]) -> Config:
    """The config of an evaluation: the data of the training, and what `overrides` change.

    Raises:
        InputError: a key or value is not in the schema, or a key has no effect here.
    """
    effective = EFFECTIVE - ONNX_DECIDES if trained.is_onnx else EFFECTIVE
    given: dict = {}
    apply_overrides(given, overrides)
    for key in flat(given):
        if key in known_keys() and key not in effective:
            why = "; weights go with the mean and std of their file" * (key in ("data.mean", "data.std"))
            of = " of an ONNX file" * trained.is_onnx
            allowed = ", ".join(sorted(effective))
            raise InputError(f"{key} has no effect on an evaluation{of}{why}; these have: {allowed}")
    raw = {"data": _as_evaluated(trained.card.data, trained.is_onnx)}
    apply_overrides(raw, overrides)
    return parse_config(raw)


def _as_evaluated(data: DataConfig, is_onnx: bool) -> dict:
    # Whatever the images were in training: the machine here may not compute in halves.
    changes = {"dtype": "fp32"} | ({"layout": "contiguous"} if is_onnx else {})
    return data.model_dump(mode="json") | changes


def start_inference(trained: Trained, config: Config) -> tuple[nn.Module, Cluster, torch.dtype | None]:
    """The network where it will compute, this process, and the autocast dtype.

    Raises:
        InputError: the device or the precision is not to be had, or the network takes no images of this size.
    """
    if isinstance(trained.network, OnnxStudent):
        trained.network.check(trained.card, config.data.image_size)
        return trained.network, start_cluster(trained.network.device(config.device)), None
    cluster = start_cluster(config.device)
    precision = config.train.precision
    if precision == "auto":
        # As its run evaluated it, so that both give the same figures, unless this machine cannot.
        precision = trained.card.precision or "auto"
        if precision == "bf16" and not has_bf16(cluster.device):
            precision = "fp32"
    precision = resolve_precision(precision, cluster.device, config.data.image_size)
    dtype = autocast_dtype(precision, cluster.device)
    check_image_dtype(config.data.dtype, dtype)
    if config.data.image_size != trained.card.data.image_size:
        trained.network.network.check_image_size(config.data.image_size)
    network = trained.network.to(cluster.device)
    set_layout(network, config.data.layout, cluster.device)
    return network, cluster, dtype
