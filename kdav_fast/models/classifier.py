"""A stock network split at its head: penultimate features and class scores in one pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdav_fast.errors import InputError, listed, one_line
from kdav_fast.models.heads import Features, LinearHeads, as_linear, class_scores, take_heads
from kdav_fast.models.normalization import Normalization
from kdav_fast.models.outputs import Extraction, Outputs
from kdav_fast.models.stages import Stages, find_stages
from kdav_fast.models.stock import Facts, find_stock

__all__ = ["ImageClassifier", "build_classifier"]


class ImageClassifier(nn.Module):
    """A network as features, B x feature_width, and a linear classifier on them, where it ends in one.

    The network is taken over, not copied: the layers of its head move to `classifier`, and what lets their input
    through takes their place in `backbone`. Both together compute exactly what the stock network computes.

    A head is one linear layer or 1x1 convolution, or several that are averaged. A network that ends otherwise
    (SqueezeNet's ReLU, VOLO's maximum over tokens, EfficientViM's learned shares of its heads) stays whole in
    `backbone`: its class scores are its own, its features what its last linear layer or 1x1 convolution sees, mean
    over pixels or tokens. Of several answers, as auxiliary heads give in training, the first counts.

    Args:
        network: a stock image classifier with new or loaded weights.
        name: where it comes from, such as `timm:resnet18`; messages use it.
        width: the channel multiplier it was built with.
        image_size: side of the square images it will see; the split is tried out on one of them.
        facts: what `find_stock` knows of it.

    Feature maps come with every answer after `take_stages`.

    Attributes:
        backbone: the stock network without its head, or all of it.
        classifier: an `nn.Linear` or `LinearHeads`; None where the class scores are no linear map of the features.
        classes: K, the number of class scores.
        feature_width: number of penultimate features; 0 where nothing can be seen of them.

    Raises:
        InputError: it gives no class scores for an RGB image of this size.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        *,
        width: float = 1.0,
        image_size: int = 224,
        facts: Facts | None = None,
    ) -> None:
        super().__init__()
        self.name, self.width, self.image_size = name, width, image_size
        self.facts = facts or Facts(image_size, {})
        training = network.training
        try:
            ending = take_heads(network.eval(), _noise(network, image_size))
        except Exception as error:  # whatever a network does that is no image classifier
            raise self.unfit(f"classify an RGB image of {image_size} x {image_size} pixels", error) from error
        finally:
            network.train(training)
        self.classes, self.feature_width = ending.classes, ending.width
        self.head_paths = ending.heads
        self.classifier = ending.classifier
        self.backbone = network
        self._features = Features()
        self._last = ending.last
        self._stages: Stages | None = None
        if ending.last is not None:
            network.get_submodule(ending.last).register_forward_pre_hook(self._features)

    @property
    def normalization(self) -> Normalization | None:
        """What pretrained weights expect of their input; None when unknown."""
        return self.facts.normalization

    def forward(self, images: Tensor) -> Outputs:
        """B x 3 x H x W images to features, B x feature_width, and logits, B x classes."""
        features, scores, stages, preactivations = self.extract(images)
        logits = self.classifier(features) if scores is None else scores
        return Outputs(features, logits, None, stages, preactivations)

    def extract(self, images: Tensor) -> Extraction:
        """As `forward`, without the classifier: for what takes its place."""
        if self._stages is not None:
            self._stages.begin()
        answer = class_scores(self.backbone(images))
        maps = ((), ()) if self._stages is None else self._stages.take()
        if self.classifier is not None:
            return Extraction(answer, None, *maps)
        features = self._features.take() if self.feature_width else answer[:, :0]
        return Extraction(features, answer, *maps)

    def take_stages(self, preactivations: bool = False) -> None:
        """From now on, answer with feature maps too: once, before compilation, sharding and copies of the network.

        What these are says `find_stages`; where they lie is tried out on one image of the size given at the start.

        Args:
            preactivations: also with the maps before their last activation. A map that ends in none, as after an
                addition, a concatenation or MobileNetV2's linear bottlenecks, is its own.

        Raises:
            InputError: it has no feature maps, or ones whose last activation no module shows.
        """
        if self._stages is not None:
            raise RuntimeError("take_stages was called before; once is enough, before the first pass")
        with _evaluating(self.backbone):
            image = _noise(self.backbone, self.image_size)
            found = find_stages(self.backbone, self.name, image, self._last, preactivations)
        self._stages = Stages(self.backbone, found, preactivations)

    def compile_backbone(self, **options: Any) -> None:
        """Have torch.compile take over the backbone, in place: under a student's head the whole is never called.

        Args:
            options: of torch.compile.
        """
        import torch._dynamo

        # By default code that was compiled for a network without feature maps, whose hooks it has not, serves the
        # next one of its kind with them: in a process that trains several students.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self.backbone.compile(**options)

    def stage_shapes(self, image_size: int | None = None) -> tuple[tuple[int, int, int], ...]:
        """C, H, W of each map of images of this size, or of that given at the start; () before `take_stages`."""
        with torch.no_grad(), _evaluating(self):
            stages = self.extract(_noise(self.backbone, image_size or self.image_size)).stages
        return tuple(tuple(stage.shape[1:]) for stage in stages)

    @torch.no_grad()
    def pools_last_stage(self) -> bool:
        """Whether the features are the mean of the last feature map over H and W; after `take_stages`."""
        with _evaluating(self):
            seen = self.extract(_noise(self.backbone, self.image_size))
        pooled = seen.stages[-1].mean((2, 3))
        return pooled.shape == seen.features.shape and torch.allclose(
            pooled, seen.features, rtol=1e-4, atol=1e-5
        )

    def linear_classifier(self) -> nn.Linear | None:
        """A copy of the classifier as one linear layer, feature_width to classes, if it is one."""
        return None if self.classifier is None else as_linear(self.classifier)

    def stock_state_dict(self) -> dict[str, Tensor]:
        """The weights, not copied, under the names with which `build_stock` loads them with `strict=True`."""
        state = dict(self.backbone.state_dict())
        for path, part in zip(self.head_paths, self._parts(), strict=True):
            part.state_dict(destination=state, prefix=f"{path}.")
        return state

    def head_state_dict(self, linear: nn.Linear) -> dict[str, Tensor]:
        """The stock network's head that does what `linear`, feature_width to classes, does: names and weights."""
        if isinstance(self.classifier, LinearHeads):
            states = self.classifier.part_states(linear)
        else:
            states = [linear.state_dict()]
        return {
            f"{path}.{name}": tensor
            for path, state in zip(self.head_paths, states, strict=True)
            for name, tensor in state.items()
        }

    def head_names(self) -> list[str]:
        """Names of the classifier's tensors in the stock network."""
        parts = zip(self.head_paths, self._parts(), strict=True)
        return [f"{path}.{name}" for path, part in parts for name, _ in part.named_parameters()]

    def load_stock_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load weights under the stock architecture's names; every one must be there and fit.

        Weights made for another image size are resampled where the network's library does that, and those of
        auxiliary heads that the network was built without are left out.

        Raises:
            InputError: missing, unexpected or differently shaped tensors; nothing is loaded.
        """
        state, differences = self.fitted(state)
        if differences:
            tensors = len(
                self.stock_state_dict().keys() | differences.keys()
            )  # its own, and those it has not
            raise InputError(
                f"the weights do not fit {self.name} with {self.classes} classes and width {self.width:g}: "
                f"{listed(list(differences.values()), 3)} ({len(differences)} of {tensors} tensors differ); give "
                "weights of this architecture or change its name, arguments, width or classes"
            )
        own = set()
        for path, part in zip(self.head_paths, self._parts(), strict=True):
            names = {f"{path}.{name}": name for name in part.state_dict()}
            part.load_state_dict({name: state[full] for full, name in names.items()})
            own |= names.keys()
        self.backbone.load_state_dict({name: state[name] for name in state if name not in own})

    def fitted(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Weights made ready for loading, and what of them still differs: the tensors' names, and in words."""
        state = {name: tensor for name, tensor in state.items() if not name.startswith(self.facts.left_out)}
        differences = self._differences(state)
        if not differences or self.facts.resample is None:
            return state, differences
        try:
            resampled = self.facts.resample(dict(state), self.backbone)
        except Exception:  # weights of something else: what differs says more
            return state, differences
        remaining = self._differences(resampled)
        return (resampled, remaining) if len(remaining) < len(differences) else (state, differences)

    @torch.no_grad()
    def check_image_size(self, image_size: int) -> None:
        """Raise `InputError` if the network, in evaluation mode, cannot classify images of this size."""
        try:
            self(_noise(self.backbone, image_size))
        except Exception as error:
            raise self.unfit(f"classify an RGB image of {image_size} x {image_size} pixels", error) from error

    def unfit(self, task: str, error: Exception) -> InputError:
        """For the user: the network cannot do a task, and what its library says."""
        reason = one_line(error).rstrip(".")
        return InputError(
            f"{self.name} cannot {task} ({reason}); set data.image_size to a size that it takes (its own is "
            f"{self.facts.image_size}), or choose another image classifier, such as timm:resnet18"
        )

    def _parts(self) -> list[nn.Module]:
        """The stock network's layers in the classifier."""
        if self.classifier is None:
            return []
        return list(self.classifier.parts) if isinstance(self.classifier, LinearHeads) else [self.classifier]

    def _differences(self, state: dict[str, Tensor]) -> dict[str, str]:
        wanted = self.stock_state_dict()
        differences = {name: f"{name} is missing" for name in wanted if name not in state}
        differences |= {name: f"{name} is unexpected" for name in state if name not in wanted}
        return (
            differences
            | {
                name: f"{name} is {_shape(state[name])}, needed {_shape(tensor)}"
                for name, tensor in wanted.items()
                if name in state and state[name].shape != tensor.shape
            }
            | {
                # Loading would cast it, though quantized weights, say, mean nothing without their scales.
                name: f"{name} is of {str(state[name].dtype).removeprefix('torch.')}, needed floating-point values"
                for name, tensor in wanted.items()
                if name in state and tensor.is_floating_point() and not state[name].is_floating_point()
            }
        )


def build_classifier(
    name: str,
    classes: int,
    *,
    width: float = 1.0,
    pretrained: bool = False,
    init: str = "published",
    image_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ImageClassifier:
    """A network by name, ready to be trained or to teach.

    Args:
        name: `timm:NAME`, `torchvision:NAME` or `cifar:NAME`.
        classes: K. Pretrained weights of another number of classes get a newly initialised classifier.
        width: channel multiplier; `cifar:` only.
        pretrained: take the library's own weights (downloads them) and record the normalisation they expect.
        init: "published", or "torch", whose convolutions start as torch's do: uniform with variance 1 / (3 fan-in).
            Under BatchNorm smaller weights mean a larger angle a step, which a short training makes use of.
        image_size: side of the images it will see; None for the network's own.
        arguments: further ones for its library's constructor, such as `drop_path_rate`.

    Raises:
        InputError: unknown name or argument, weights that cannot be had, or a network that gives no class scores for
            an image of that size.
    """
    stock = find_stock(
        name, classes, width=width, pretrained=pretrained, image_size=image_size, arguments=arguments
    )
    model = ImageClassifier(
        stock.network,
        name,
        width=width,
        image_size=image_size or stock.facts.image_size,
        facts=stock.facts,
    )
    if model.classes != classes:
        raise InputError(
            f"{name} gives {model.classes} class scores where {classes} were asked for; choose another network"
        )
    if init == "torch":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
    return model


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and then each in its own again."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _noise(network: nn.Module, image_size: int) -> Tensor:
    """An image of random pixels, of which a network makes features that are not all alike."""
    parameter = next(network.parameters(), torch.empty(0))
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return image.to(parameter)


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a scalar"
