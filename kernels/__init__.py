"""The KDAV objective: one public function, several implementations of the same mathematics."""

from kdav_fast.kernels.loss import KDAVLoss, KDAVResult, kdav_loss

__all__ = ["KDAVLoss", "KDAVResult", "kdav_loss"]
