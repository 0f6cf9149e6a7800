"""What the student learns from: one interface, one file a method."""

import torch
from torch import nn

from kdav_fast.config import DistillerConfig, KDAVConfig, KDConfig, SimKDConfig
from kdav_fast.distillers.base import Distiller, Losses, Target
from kdav_fast.distillers.kd import KDDistiller
from kdav_fast.distillers.kdav import KDAVDistiller
from kdav_fast.distillers.none import LabelsOnly
from kdav_fast.distillers.simkd import SimKDDistiller

__all__ = ["Distiller", "Losses", "Target", "build_distiller"]


def build_distiller(
    config: DistillerConfig,
    *,
    student_width: int,
    teacher_classifier: nn.Linear | None,
    classes: int,
    label_smoothing: float,
    dtype: torch.dtype = torch.float32,
    teacher_width: int | None = None,
) -> Distiller:
    """The distiller that a config names.

    Args:
        student_width: penultimate features of the student.
        teacher_classifier: the teacher's last layer, with whole weights; None without a teacher, or where it has no
            such layer, which simkd needs.
        classes: K.
        label_smoothing: for the terms that use labels.
        dtype: in which large products are taken and embeddings remembered; sums are in float32.
        teacher_width: penultimate features of the teacher; None: what its classifier sees.
    """
    if isinstance(config, KDAVConfig):
        return KDAVDistiller(
            config,
            student_width=student_width,
            teacher_width=teacher_width or teacher_classifier.in_features,
            classes=classes,
            label_smoothing=label_smoothing,
            dtype=dtype,
        )
    if isinstance(config, SimKDConfig):
        return SimKDDistiller(config, student_width=student_width, teacher_classifier=teacher_classifier)
    if isinstance(config, KDConfig):
        return KDDistiller(config.alpha, config.temperature, label_smoothing)
    return LabelsOnly(label_smoothing)
