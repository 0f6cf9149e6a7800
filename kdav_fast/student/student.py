"""The network that is trained: a stock classifier, or its backbone with an embedding head."""

import torch
from torch import Tensor, nn

from kdav_fast.errors import InputError
from kdav_fast.models import ImageClassifier
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import FoldableHead


class Student(nn.Module):
    """A classifier under training.

    Args:
        network: the stock network, split at its classifier.
        head: takes the place of the classifier, which is then neither trained nor saved.

    Raises:
        InputError: a head for a network without a linear classifier, or with one without bias: folding needs both;
            or one that works on maps, for a network whose features are no mean of its last one.
    """

    def __init__(self, network: ImageClassifier, head: FoldableHead | None = None) -> None:
        super().__init__()
        self.network = network
        self.head = head
        if head is not None:
            if network.classifier is None:
                raise InputError(
                    f"{network.name} has class scores that are no fixed linear function of pooled features, so that no "
                    "embedding head can take the place of its classifier; choose another student, or distiller.name=kd"
                )
            if network.classifier.bias is None:
                raise InputError(
                    f"{network.name} ends in a linear layer without bias, into which an embedding head cannot "
                    "fold; choose another student, or distiller.name=kd"
                )
            if head.on_maps and not network.pools_last_stage():
                raise InputError(
                    f"the features of {network.name} are not the mean of its last feature map, on which this method's "
                    "head works; choose another student, such as cifar:resnet8x4 or timm:resnet18, or distiller.name=kd"
                )
            network.classifier.requires_grad_(False)

    def forward(self, images: Tensor) -> Outputs:
        """B x 3 x S x S images to outputs: float32 but for feature maps, under whatever autocast networks run in."""
        if self.head is None:
            outputs = self.network(images)
            return outputs._replace(features=outputs.features.float(), logits=outputs.logits.float())
        features, _, stages, preactivations = self.network.extract(images)
        features, head_map = features.float(), None
        if self.head.on_maps:
            embedding, head_map = self.head(stages[-1])
            embedding = embedding.float()
        with torch.autocast(images.device.type, enabled=False):
            if not self.head.on_maps:
                embedding = self.head(features)
            logits = self.head.classify(embedding.detach())
        return Outputs(features, logits, embedding, stages, preactivations, head_map)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The stock architecture's weights, a head folded into its classifier: exact in evaluation mode. Copies."""
        state = self.network.stock_state_dict()
        if self.head is not None:
            state |= self.network.head_state_dict(self.head.fold())
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
