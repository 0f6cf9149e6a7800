"""A flag of the device that the host hears of later, so that it need not wait for it now."""

import torch
from torch import Tensor


class LateFlag:
    """On its way to the host since it was made.

    Args:
        flag: scalar, boolean.
    """

    def __init__(self, flag: Tensor) -> None:
        self._flag, self._arrived = flag, None
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool:
        """Wait until the device has come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
