"""The student's head: into the teacher's space, there to class scores, and all of it into one linear layer."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from kdav_fast.errors import InputError
from kdav_fast.kernels.caller import product


class FoldableHead(nn.Module):
    """Embeddings and a linear classifier on them, in the place of a student's own.

    At inference the embedding is an affine map of the pooled features, so that it and the classifier fold into one
    `nn.Linear` and the deployed student keeps its stock architecture.

    Attributes:
        probabilistic: whether a softmax of the class scores is a distribution.
        on_maps: whether it is given the last feature map, B x C x H x W, in place of the pooled features, B x
            student_width. Then it gives the embedding and another map, which the method finds in `Outputs.head_map`.
        width: of the embedding.

    Args:
        student_width: penultimate features of the student.
        teacher_width: d, the embedding's width.
        classes: K.

    Raises:
        InputError: a size below 1.
    """

    probabilistic: bool = True
    on_maps: bool = False

    def __init__(self, student_width: int, teacher_width: int, classes: int) -> None:
        super().__init__()
        sizes = {"student_width": student_width, "teacher_width": teacher_width, "classes": classes}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{type(self).__name__}: {name} is {value}; it must be at least 1")
        self.width, self.classes = teacher_width, classes

    @abstractmethod
    def classifier(self) -> tuple[Tensor, Tensor]:
        """Weight, K x d, and bias, K, of the classifier on embeddings."""

    @abstractmethod
    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight, d x student_width, and bias, d, float64, that make pooled features embeddings at inference."""

    def classify(self, embedding: Tensor) -> Tensor:
        """Embeddings, B x d, to class scores, B x K, in the embeddings' dtype, under autocast too."""
        weight, bias = self.classifier()
        return product(embedding, weight.T.to(embedding.dtype)) + bias.to(embedding.dtype)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The same classifier as one linear layer on student features: exact in evaluation mode.

        Computed in float64, returned in the dtype of the parameters.
        """
        weight, bias = (tensor.double() for tensor in self.classifier())
        inner, shift = self.affine()
        bias, weight = bias + weight @ shift, weight @ inner
        # Without initial weights: drawing them would change the random numbers of a run that saves its student.
        parameter = next(self.parameters())
        classes, width = weight.shape
        folded = skip_init(nn.Linear, width, classes, device=parameter.device, dtype=parameter.dtype)
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
        return folded


class ProjectedHead(FoldableHead):
    """A projector into the teacher's space, Linear + BatchNorm, and a linear classifier there that is not trained.

    Arguments and errors are those of `FoldableHead`.
    """

    def __init__(self, student_width: int, teacher_width: int, classes: int) -> None:
        super().__init__(student_width, teacher_width, classes)
        # BatchNorm's shift makes a bias here redundant.
        self.projector = nn.Linear(student_width, teacher_width, bias=False)
        self.norm = nn.BatchNorm1d(teacher_width)

    def forward(self, features: Tensor) -> Tensor:
        """Student features, B x student_width, to embeddings z, B x d."""
        return self.norm(self.projector(features))

    def affine(self) -> tuple[Tensor, Tensor]:
        return _followed(self.projector.weight.double(), self.norm)


class ManyToOneHead(FoldableHead):
    """NORM's head: the last map is expanded to many of the teacher's, reduced again, and added (Liu et al., ICLR 2023).

    Args:
        student_width: C, channels of the student's last map, of which its pooled features are the mean.
        teacher_width: of its last map.
        classes: K.
        copies: N, of the teacher's map.
    """

    probabilistic = False
    on_maps = True

    def __init__(self, student_width: int, teacher_width: int, classes: int, copies: int) -> None:
        super().__init__(student_width, student_width, classes)
        many = copies * teacher_width
        self.expand = nn.Sequential(nn.Conv2d(student_width, many, 1, bias=False), nn.BatchNorm2d(many))
        self.reduce = nn.Sequential(
            nn.Conv2d(many, student_width, 1, bias=False), nn.BatchNorm2d(student_width)
        )
        for conv in (self.expand[0], self.reduce[0]):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.linear = nn.Linear(student_width, classes)

    def forward(self, stage: Tensor) -> tuple[Tensor, Tensor]:
        """The last map F, B x C x H x W, to pooled F + R, B x C, and the expanded map E, B x N C_t x H x W."""
        expanded = self.expand(stage)
        return (stage + self.reduce(expanded)).mean((2, 3)), expanded

    def classifier(self) -> tuple[Tensor, Tensor]:
        """The student's, trained."""
        return self.linear.weight, self.linear.bias

    def affine(self) -> tuple[Tensor, Tensor]:
        (conv, norm), (back, last) = self.expand, self.reduce
        weight, bias = _followed(conv.weight.flatten(1).double(), norm)
        inner = back.weight.flatten(1).double()
        weight, bias = _followed(inner @ weight, last, inner @ bias)
        return weight + torch.eye(len(weight), dtype=weight.dtype, device=weight.device), bias


def _followed(weight: Tensor, norm: nn.Module, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of an affine map followed by BatchNorm in evaluation mode."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale[:, None] * weight, norm.bias.double() + scale * (bias - norm.running_mean.double())


class EmbeddingHead(ProjectedHead):
    """KDAV's head: a centre, and class prototypes as the classifier (DESIGN section 2, "The classifier").

    Arguments and errors are those of `FoldableHead`.
    """

    SUMS = ("class_sum", "class_mass")
    """Buffers that are sums over what this process has seen."""
    probabilistic = False

    def __init__(self, student_width: int, teacher_width: int, classes: int) -> None:
        super().__init__(student_width, teacher_width, classes)
        # Sums in float64: over an ImageNet epoch a float32 sum loses the digits that centring needs.
        self.register_buffer("center", torch.zeros(teacher_width))
        self.register_buffer("class_sum", torch.zeros(classes, teacher_width, dtype=torch.float64))
        self.register_buffer("class_mass", torch.zeros(classes, dtype=torch.float64))

    def center_teacher(self, teacher_embedding: Tensor) -> Tensor:
        """Teacher embeddings, B x d, less the measured centre (zero until `set_center`)."""
        return teacher_embedding - self.center.to(teacher_embedding.dtype)

    @torch.no_grad()
    def observe(self, teacher_embedding: Tensor, target: Tensor) -> None:
        """Add uncentred teacher embeddings, B x d, to the class sums.

        Args:
            teacher_embedding: B x d.
            target: B class ids (int64), or B x K class probabilities where there are no labels.
        """
        weight = self.one_hot(target) if target.ndim == 1 else target.to(torch.float64)
        self.class_sum += weight.T @ teacher_embedding.to(torch.float64)
        self.class_mass += weight.sum(0)

    def one_hot(self, labels: Tensor) -> Tensor:
        """B class ids to B x K weights, float64."""
        return F.one_hot(labels, self.classes).to(torch.float64)

    @torch.no_grad()
    def set_center(self) -> None:
        """Take the mean of all embeddings observed so far as the centre."""
        total = self.class_mass.sum()
        if total == 0:
            raise InputError(
                "EmbeddingHead.set_center: no teacher embedding was observed yet; call observe first"
            )
        self.center.copy_(self.class_sum.sum(0) / total)

    def prototypes(self) -> Tensor:
        """mu: directions of the centred class means, K x d, float64; zero for a class never observed."""
        centred = self.class_sum - self.class_mass[:, None] * self.center.to(torch.float64)
        return F.normalize(centred, dim=1)

    def class_scores(self, embedding: Tensor, kappa: float) -> Tensor:
        """kappa <mu_y, z/|z|>, B x K: the logits of the von Mises-Fisher classifier around the prototypes.

        In the embeddings' dtype, under autocast too.
        """
        return product(kappa * F.normalize(embedding, dim=1), self.prototypes().T.to(embedding.dtype))

    def classifier(self) -> tuple[Tensor, Tensor]:
        """The prototypes without bias: the largest <mu_y, z> is the Bayes classifier's (|z| does not change it)."""
        return self.prototypes(), self.class_mass.new_zeros(self.classes)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """As `FoldableHead.fold`.

        Raises:
            InputError: nothing was observed, so that every class would score 0 for every image.
        """
        if not self.class_mass.any():
            raise InputError(
                "EmbeddingHead.fold: no teacher embedding was observed, so there are no prototypes to classify by; "
                "call observe(teacher_embedding, labels) first, for every training image"
            )
        return super().fold()


class ReusedClassifierHead(ProjectedHead):
    """SimKD's head: the teacher's own classifier (Chen et al., CVPR 2022).

    It scores 0 until `reuse`. Arguments and errors are those of `FoldableHead`.
    """

    def __init__(self, student_width: int, teacher_width: int, classes: int) -> None:
        super().__init__(student_width, teacher_width, classes)
        # Buffers: saved with the student, but neither trained nor sharded.
        self.register_buffer("classifier_weight", torch.zeros(classes, teacher_width))
        self.register_buffer("classifier_bias", torch.zeros(classes))

    @torch.no_grad()
    def reuse(self, classifier: nn.Linear) -> None:
        """Copy the teacher's last layer, d to K; one without bias has bias 0."""
        self.classifier_weight.copy_(classifier.weight)
        if classifier.bias is not None:
            self.classifier_bias.copy_(classifier.bias)

    def classifier(self) -> tuple[Tensor, Tensor]:
        """The teacher's."""
        return self.classifier_weight, self.classifier_bias
