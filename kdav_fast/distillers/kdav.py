"""Knowledge distillation with an auxiliary variable (Peng, Fang, Zhang, Lu: ICML 2024)."""

import torch

from kdav_fast.config import KDAVConfig
from kdav_fast.distillers.base import Distiller, Losses, Target, label_loss, mean_over_valid
from kdav_fast.distillers.memories.ring import TeacherMemory
from kdav_fast.kernels import KDAVLoss
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import EmbeddingHead


class KDAVDistiller(Distiller):
    """Membership and prediction terms over a memory of teacher features (DESIGN section 2).

    Labels are not used unless `weight_label` adds the cross-entropy of the class prototypes' scores.

    The student's classifier gives way to an embedding head, whose class prototypes come from the teacher's
    embeddings. Embeddings meet the memory in `dtype`, half precision in a bf16 run: every sum is still in float32.
    """

    def __init__(
        self,
        config: KDAVConfig,
        *,
        student_width: int,
        teacher_width: int,
        classes: int,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight_label, self.label_smoothing = config.weight_label, label_smoothing
        self.kappa = config.kappa_student
        self.dtype = dtype
        self.center = config.center
        self.running_prototypes = config.prototypes == "running"
        self.memory = TeacherMemory(
            config.memory_length,
            teacher_width,
            classes,
            config.posterior,
            temperature=config.temperature,
            dtype=dtype,
        )
        # The head is trained, sharded and saved as a part of the student: registered there, not here.
        object.__setattr__(self, "head", EmbeddingHead(student_width, teacher_width, classes))
        self.loss = KDAVLoss(
            kappa_student=config.kappa_student,
            kappa_teacher=config.kappa_teacher,
            temperature=config.temperature,
            weight_membership=config.weight_membership,
            weight_prediction=config.weight_prediction,
            reduction="none",
            impl=config.impl,
        )

    @property
    def needs_measuring(self) -> bool:
        return self.center or not self.running_prototypes

    def measure(self, teacher: Outputs, target: Target) -> None:
        self._observe(teacher, target)

    def finish_measuring(self) -> None:
        if self.center:
            self.head.set_center()
        if self.running_prototypes:
            self.head.class_sum.zero_()
            self.head.class_mass.zero_()

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> Losses:
        if self.running_prototypes:
            self._observe(teacher, target)
        embedding = self.head.center_teacher(teacher.features)
        self.memory.push(embedding, teacher.logits, target.valid)
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
        if self.weight_label > 0:
            scores = self.head.class_scores(student.embedding, self.kappa)
            hard = label_loss(scores, target, self.label_smoothing)
            rows, parts["cross_entropy"] = rows + self.weight_label * hard, hard.detach()
        means = {name: mean_over_valid(part, target.valid) for name, part in parts.items()}
        return Losses(mean_over_valid(rows, target.valid), means)

    def _observe(self, teacher: Outputs, target: Target) -> None:
        """Padding and rows that are not finite get weight 0, which keeps shapes fixed on every rank."""
        finite = teacher.features.isfinite().all(1) & target.valid
        share = self.head.one_hot(target.labels) * finite[:, None]
        self.head.observe(teacher.features.where(finite[:, None], 0.0), share)
