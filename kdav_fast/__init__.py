"""Knowledge distillation with an auxiliary variable, from image files to an exported student."""

from importlib import import_module

_HOMES = {
    "kdav_loss": "kdav_fast.kernels",
    "KDAVLoss": "kdav_fast.kernels",
    "KDAVResult": "kdav_fast.kernels",
    "TeacherMemory": "kdav_fast.distillers.memories.ring",
    "EmbeddingHead": "kdav_fast.student.heads",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import on first use: the command line answers `--help` and bad configs without loading torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kdav_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
