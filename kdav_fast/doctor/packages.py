"""Libraries, judged by their package metadata: importing DeepSpeed, timm or torchvision takes seconds."""

from importlib import metadata

import torch

from kdav_fast.doctor.probing import Answer, Off, version_of


def torchvision() -> Answer:
    """Whether it is the one of this torch."""
    version = version_of("torchvision")
    pins = [r.split(";")[0] for r in metadata.requires("torchvision") or [] if r.startswith("torch==")]
    wanted = pins[0].removeprefix("torch==").strip() if pins else None
    if wanted and wanted != torch.__version__.split("+")[0]:
        found = f"torchvision {version} is built for torch {wanted}, but torch is {torch.__version__}"
        raise Off(found, f"pip install 'torch=={wanted}' 'torchvision=={version}'")
    return "on", version


def onnx() -> Answer:
    """Whether a student can be exported as ONNX."""
    try:
        return "on", ", ".join(f"{name} {version_of(name)}" for name in ("onnx", "onnxscript", "onnxruntime"))
    except Off as off:
        raise Off(str(off), "pip install 'kdav_fast[onnx]'") from None
