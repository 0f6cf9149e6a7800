"""What every memory has in common: a step that is not taken leaves it as it was."""

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """Rows in buffers. Once `keep_overwritten` was called, what is written can be taken back until `settle`.

    What was there before is kept for the rows in question only, and nothing waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._overwritten: list[tuple[Tensor, Tensor | None, Tensor]] | None = None

    def keep_overwritten(self) -> None:
        """From now on; then `settle` must be called after every step."""
        self._overwritten = []

    @torch.no_grad()
    def settle(self, taken: Tensor) -> None:
        """Take back what was written since the last call, unless the step was taken.

        Args:
            taken: scalar, boolean; on another device than the memory's it is waited for.
        """
        while self._overwritten:
            buffer, slot, before = self._overwritten.pop()
            here = taken.to(buffer.device)
            if slot is None:
                buffer.copy_(torch.where(here, buffer, before))
            else:
                buffer[slot] = torch.where(here, buffer[slot], before)

    def _keep(self, slot: Tensor | None, *buffers: Tensor) -> None:
        """To be called before rows `slot` of buffers, or None for all of them, are written."""
        if self._overwritten is not None:
            for buffer in buffers:
                before = buffer.clone() if slot is None else buffer[slot]
                self._overwritten.append((buffer, slot, before))
