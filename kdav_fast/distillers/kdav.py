"""Knowledge distillation with an auxiliary variable (Peng, Fang, Zhang, Lu: ICML 2024)."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Count, Mark, Temperature, Weight, within
from kdav_fast.config.training import TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, mean_over_valid
from kdav_fast.distillers.memories.checks import require_room
from kdav_fast.distillers.memories.gather import Gathering
from kdav_fast.distillers.memories.ring import TeacherMemory
from kdav_fast.distillers.phases import Measure
from kdav_fast.errors import InputError
from kdav_fast.kernels import KDAVLoss
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import EmbeddingHead

Kappa = Annotated[float, within(1e-3, 1e4, "beyond, all remembered images are alike, or one alone counts")]
"""A concentration."""


class KDAV(Distiller):
    """Membership and prediction terms over a memory of teacher features (docs/methods.md).

    Labels are not used unless `weight_label` adds the cross-entropy of the class prototypes' scores.

    The student's classifier gives way to an embedding head, whose class prototypes come from the teacher's
    embeddings. Embeddings meet the memory in half precision in a bf16 run: every sum is still in float32.
    """

    class Config(MethodConfig):
        """Names follow `kdav_loss`."""

        kappa_student: Kappa = 10.0
        """Concentration of the student's membership distribution."""
        kappa_teacher: Kappa = 10.0
        """Of the teacher's; best equal to the student's."""
        temperature: Temperature = 1.0
        """T of the teacher's class distribution."""
        weight_membership: Weight = 1.0
        """Of the KL between the two membership distributions."""
        weight_prediction: Weight = 1.0
        """Of T^2 KL between the class distributions."""
        weight_label: Weight = 0.0
        """Of the cross-entropy with the labels, where classes score kappa_student <mu_y, z/|z|>; 0: labels are not
        used."""
        memory_length: Annotated[Count, Field(lt=2**31), Mark.SIZE] = 4096
        """Embeddings of the teacher that are remembered."""
        posterior: Literal["dense", "ids"] = "dense"
        """What the memory keeps of a remembered image: the teacher's class distribution or one class id."""
        center: bool = True
        """Centre teacher embeddings by their mean over the training set, measured before training."""
        prototypes: Literal["measured", "running"] = "measured"
        """Class means from one pass before training, or from running sums during training."""
        impl: Literal["auto", "reference", "chunked", "triton", "compile"] = "auto"
        """How the loss is computed; all give the same."""

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.weight_membership == 0 and self.weight_prediction == 0:
                raise ValueError(
                    "distiller.weight_membership and distiller.weight_prediction are both 0; raise one"
                )
            return self

        @property
        def uses_labels(self) -> bool:
            return self.weight_label > 0

        def check_run(self, train: TrainConfig) -> None:
            if train.label_smoothing > 0 and not self.uses_labels:
                raise ValueError(
                    "train.label_smoothing does not go with distiller.name 'kdav', which uses no labels; use "
                    "train.label_smoothing=0, or, with kdav, distiller.weight_label above 0"
                )
            if self.prototypes == "running" and (train.mixup > 0 or train.cutmix > 0):
                raise ValueError(
                    "distiller.prototypes is 'running' but train.mixup or train.cutmix is on: a mixed image has no "
                    "class; use distiller.prototypes=measured"
                )
            images = train.batch_size // train.accumulate
            if self.memory_length < images:
                raise ValueError(
                    f"distiller.memory_length is {self.memory_length}, but {images} images enter the memory at once "
                    "(train.batch_size / train.accumulate), and each must be among its candidates; use at least that"
                )

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if not facts.teacher.features:
            raise InputError(
                f"the teacher {facts.teacher.name} has no layer whose input could serve as features, which "
                "distiller.name 'kdav' remembers; use distiller.name=kd, or another teacher"
            )
        if config.impl == "triton" and facts.device.type != "cuda":
            raise InputError(
                f"distiller.impl is 'triton' but the device is '{facts.device.type}'; the fused kernels need a GPU: "
                "use distiller.impl=auto"
            )
        self.config, self.images = config, len(facts.labels)
        self.label_smoothing, self.dtype = facts.label_smoothing, facts.dtype
        row = facts.teacher.features + (facts.classes if config.posterior == "dense" else 0)
        require_room(
            f"distiller.memory_length {config.memory_length} x {row} values",
            config.memory_length * (row * facts.dtype.itemsize + 8),
            facts.device,
            "lower distiller.memory_length"
            + ", or use distiller.posterior=ids" * (config.posterior == "dense"),
        )
        self.memory = TeacherMemory(
            config.memory_length,
            facts.teacher.features,
            facts.classes,
            config.posterior,
            temperature=config.temperature,
            dtype=facts.dtype,
        )
        self.lend("_head", EmbeddingHead(facts.student.features, facts.teacher.features, facts.classes))
        self.loss = KDAVLoss(
            kappa_student=config.kappa_student,
            kappa_teacher=config.kappa_teacher,
            temperature=config.temperature,
            weight_membership=config.weight_membership,
            weight_prediction=config.weight_prediction,
            reduction="none",
            impl=config.impl,
        )

    def head(self) -> EmbeddingHead:
        return self._head

    def remarks(self) -> Sequence[str]:
        if self.config.memory_length <= self.images:
            return ()
        return (
            f"note: distiller.memory_length is {self.config.memory_length} with {self.images} training images: it "
            "holds an image as the teacher saw it in several epochs",
        )

    def phases(self) -> Sequence[Measure]:
        if self.config.prototypes == "running" and not self.config.center:
            return ()
        sums = (self._head.class_sum, self._head.class_mass)
        return (Measure("the teacher's embeddings", self._observe, sums, self._finish_measuring),)

    def before_student(self, teacher: Outputs, batch: Batch) -> tuple[Tensor, Gathering]:
        """The teacher's embeddings, B x d, and those of all ranks with their posteriors, on their way."""
        embedding = self._head.center_teacher(teacher.features)
        return embedding, self.memory.send(embedding, teacher.logits, batch.valid)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
        embedding: Tensor,
        sent: Gathering,
    ) -> Losses:
        if self.config.prototypes == "running":
            self._observe(batch, teacher)
        self.memory.receive(sent)
        result = self.loss(
            student.embedding.to(self.dtype),
            embedding.to(self.dtype),
            teacher.logits,
            self.memory.embedding,
            self.memory.posterior,
            self.memory.filled,
        )
        rows = result.loss
        parts = {"membership_kl": result.membership_kl, "prediction_kl": result.prediction_kl}
        if self.config.uses_labels:
            scores = self._head.class_scores(student.embedding, self.config.kappa_student)
            hard = label_loss(scores, batch, self.label_smoothing)
            rows, parts["cross_entropy"] = rows + self.config.weight_label * hard, hard.detach()
        means = {name: mean_over_valid(part, batch.valid) for name, part in parts.items()}
        return Losses(mean_over_valid(rows, batch.valid), means)

    def _observe(self, batch: Batch, teacher: Outputs) -> None:
        """Padding and rows that are not finite get weight 0, which keeps shapes fixed on every rank."""
        finite = teacher.features.isfinite().all(1) & batch.valid
        share = self._head.one_hot(batch.labels) * finite[:, None]
        self._head.observe(teacher.features.where(finite[:, None], 0.0), share)

    def _finish_measuring(self) -> None:
        if self.config.center:
            self._head.set_center()
        if self.config.prototypes == "running":
            self._head.class_sum.zero_()
            self._head.class_mass.zero_()


METHOD = KDAV
