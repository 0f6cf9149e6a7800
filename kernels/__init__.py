"""The KDAV objective: one public function, several implementations of the same mathematics."""

from kdav_fast.kernels.dispatch import explain_choice
from kdav_fast.kernels.loss import KDAVLoss, KDAVResult, kdav_loss

__all__ = ["KDAVLoss", "KDAVResult", "explain_choice", "kdav_loss"]
