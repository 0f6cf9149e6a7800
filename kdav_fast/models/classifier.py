"""A stock network split at its last linear layer: penultimate features and class scores in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdav_fast.errors import InputError
from kdav_fast.models.normalization import Normalization
from kdav_fast.models.stock import build_stock, find_stock
from kdav_fast.outputs import Outputs

__all__ = ["ImageClassifier", "build_classifier", "build_stock"]


class ImageClassifier(nn.Module):
    """A network whose output is one `nn.Linear` over features of shape B x feature_width.

    The network is taken over, not copied: its last linear layer moves to `classifier` and an `nn.Identity`
    takes its place in `backbone`. Both together compute exactly what the stock network computes.

    Args:
        network: a stock image classifier with new or loaded weights.
        name: where it comes from, such as `timm:resnet18`; messages use it.
        width: the channel multiplier it was built with.
        image_size: side of the square images it is made for; the split is checked on one of them.
        normalization: what its weights expect of their input; `None` when unknown.

    Attributes:
        backbone: the stock network without its last linear layer.
        classifier: that `nn.Linear`.
        classifier_path: its name in the stock network, such as `fc` or `head.fc`.

    Raises:
        InputError: the network does not end in one `nn.Linear` whose output is the network's, for instance a
            convolution (SqueezeNet), two averaged heads (distilled DeiT) or auxiliary heads (GoogLeNet).
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        *,
        width: float = 1.0,
        image_size: int = 224,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.width = width
        self.normalization = normalization
        self.classifier_path = _find_classifier(network, name, image_size)
        self.classifier = network.get_submodule(self.classifier_path)
        network.set_submodule(self.classifier_path, nn.Identity())
        self.backbone = network

    @property
    def classes(self) -> int:
        """K, the number of class scores."""
        return self.classifier.out_features

    @property
    def feature_width(self) -> int:
        """Number of penultimate features."""
        return self.classifier.in_features

    def forward(self, images: Tensor) -> Outputs:
        """B x 3 x H x W images to features, B x feature_width, and logits, B x classes."""
        features = self.backbone(images)
        return Outputs(features, self.classifier(features))

    def stock_state_dict(self) -> dict[str, Tensor]:
        """The weights, not copied, under the names with which `build_stock` loads them with `strict=True`."""
        state = dict(self.backbone.state_dict())
        self.classifier.state_dict(destination=state, prefix=f"{self.classifier_path}.")
        return state

    def load_stock_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load weights under the stock architecture's names; every one must be there and fit.

        Raises:
            InputError: missing, unexpected or differently shaped tensors; nothing is loaded.
        """
        wanted = self.stock_state_dict()
        differences = [f"{name} is missing" for name in wanted if name not in state]
        differences += [f"{name} is unexpected" for name in state if name not in wanted]
        differences += [
            f"{name} is {_shape(state[name])}, needed {_shape(tensor)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if differences:
            shown = ", ".join(differences[:3])
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise InputError(
                f"the weights do not fit {self.name} with {self.classes} classes and width {self.width:g}: "
                f"{shown}{more} ({len(differences)} of {len(wanted)} tensors differ); give weights of this "
                "architecture or change its name, width or classes"
            )
        head = f"{self.classifier_path}."
        own = {name: tensor for name, tensor in state.items() if name.startswith(head)}
        self.classifier.load_state_dict({name.removeprefix(head): tensor for name, tensor in own.items()})
        self.backbone.load_state_dict({name: state[name] for name in state if name not in own})


def build_classifier(
    name: str, classes: int, *, width: float = 1.0, pretrained: bool = False, init: str = "published"
) -> ImageClassifier:
    """A network by name, ready to be trained or to teach.

    Args:
        name: `timm:NAME`, `torchvision:NAME` or `cifar:NAME`.
        classes: K. Pretrained weights of another number of classes get a newly initialised classifier.
        width: channel multiplier; `cifar:` only.
        pretrained: take the library's own weights (downloads them) and record the normalisation they expect.
        init: "published", or "torch", whose convolutions start as torch's do: uniform with variance 1 / (3 fan-in).
            Under BatchNorm smaller weights mean a larger angle a step, which a short training makes use of.

    Raises:
        InputError: unknown name, weights that cannot be had, or a network that `ImageClassifier` refuses.
    """
    stock = find_stock(name, classes, width=width, pretrained=pretrained)
    model = ImageClassifier(
        stock.network, name, width=width, image_size=stock.image_size, normalization=stock.normalization
    )
    if model.classes != classes:
        has_bias = model.classifier.bias is not None
        model.classifier = nn.Linear(model.feature_width, classes, bias=has_bias)
    if init == "torch":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
    return model


def _find_classifier(network: nn.Module, name: str, image_size: int) -> str:
    """Path of the linear layer whose output is the network's output, found by watching one image pass."""
    linears = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    calls: list[str] = []
    last: dict[str, Tensor] = {}

    def record(path: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append(path)
            last.update(features=inputs[0], logits=output)

        return hook

    handles = [module.register_forward_hook(record(path)) for path, module in linears.items()]
    try:
        output = _classify_blank_image(network, name, image_size)
    finally:
        for handle in handles:
            handle.remove()

    if not calls or last["logits"] is not output:
        raise _not_splittable(name, "its output is not the output of an nn.Linear")
    path = calls[-1]
    if last["features"].dim() != 2:
        raise _not_splittable(name, f"{path} reads a tensor of {last['features'].dim()} dimensions, not 2")
    if calls.count(path) > 1:
        raise _not_splittable(name, f"{path} is called {calls.count(path)} times for an image")
    # Only a plain Linear is a head: MultiheadAttention reads the weights of a subclass without calling it.
    classes = linears[path].out_features
    for other, module in linears.items():
        if other not in calls and type(module) is nn.Linear and module.out_features == classes:
            raise _not_splittable(name, f"it has another head, {other}, that only training uses")
    return path


def _classify_blank_image(network: nn.Module, name: str, image_size: int) -> Any:
    training = network.training
    parameter = next(network.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad():
            return network.eval()(image)
    except Exception as error:  # whatever a network does that is no image classifier
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} cannot classify an RGB image of {image_size} x {image_size} pixels ({reason}); "
            "choose an image classifier, such as timm:resnet18"
        ) from error
    finally:
        network.train(training)


def _not_splittable(name: str, reason: str) -> InputError:
    return InputError(
        f"{name} does not end in one nn.Linear over pooled features: {reason}; "
        "choose a network that does, such as timm:resnet18 or torchvision:mobilenet_v2"
    )


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a scalar"
