"""The frozen teacher: a network that answers every batch."""

import torch
from torch import Tensor, nn

from kdav_fast.data.batch import Batch
from kdav_fast.models import ImageClassifier
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.precision import autocast


class FrozenTeacher(nn.Module):
    """A classifier that only answers: always in evaluation mode, outside engine, optimizer and checkpoints.

    Args:
        network: with its weights loaded, on `device`.
        renormalize: from the data's input normalisation to the one the weights expect.
        device: where it answers.
        dtype: autocast dtype; None for float32.
    """

    def __init__(
        self,
        network: ImageClassifier,
        renormalize: nn.Module,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.renormalize = renormalize.to(device)
        self.device, self.dtype = device, dtype
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in evaluation mode: a teacher whose BatchNorm statistics move is another teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        """The answers to `batch.images`, normalised as the data are: float32, but for feature maps."""
        return self.answer(batch.images, self.dtype)

    @torch.no_grad()
    def answer(self, images: Tensor, dtype: torch.dtype | None) -> Outputs:
        """The answers to V*B x 3 x S x S images in another autocast dtype."""
        with autocast(self.device, dtype):
            outputs = self.network(self.renormalize(images))
        return outputs._replace(features=outputs.features.float(), logits=outputs.logits.float())
