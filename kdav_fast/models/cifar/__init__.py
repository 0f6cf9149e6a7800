"""The small networks of the distillation literature, in their published sizes."""

from kdav_fast.models.cifar.registry import CIFAR_NETWORKS

__all__ = ["CIFAR_NETWORKS"]
