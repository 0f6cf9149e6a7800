"""The queue of teacher features that the auxiliary variable ranges over."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdav_fast.distillers.memories.checks import check_range, check_sizes, check_valid
from kdav_fast.distillers.memories.gather import Gathering
from kdav_fast.distillers.memories.memory import Memory
from kdav_fast.errors import InputError


class TeacherMemory(Memory):
    """A ring of the most recent teacher embeddings and their class posteriors (DESIGN section 2: U and R).

    All state is in buffers, so `state_dict` and `load_state_dict` save and restore it exactly, and nothing
    in `push` waits for the device.

    Args:
        length: L, rows of the ring.
        width: d, the teacher's embedding width.
        classes: K.
        posterior: "dense" keeps softmax(logits / temperature), L x K; "ids" keeps one class id a row.
        temperature: T of the dense posterior.
        dtype: of what is stored; but embeddings are kept in float16 where it is bfloat16: unit rows fit that, with 8
            times the precision in as many bytes, and the fused loss takes them as they are.

    Raises:
        InputError: a size that is no whole number or below 1, an unknown `posterior`, a temperature not above 0.
    """

    def __init__(
        self,
        length: int,
        width: int,
        classes: int,
        posterior: Literal["dense", "ids"] = "dense",
        *,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("TeacherMemory", length=length, width=width, classes=classes)
        if posterior not in ("dense", "ids"):
            raise InputError(f"TeacherMemory: posterior is {posterior!r}; allowed: 'dense', 'ids'")
        if not 0 < temperature < math.inf:
            raise InputError(f"TeacherMemory: temperature is {temperature}; it must be above 0 and finite")
        self.length, self.width, self.classes, self.temperature = length, width, classes, temperature
        # One row more than the ring: rows that must not be remembered are written there, so that a push
        # has fixed shapes and needs no answer from the device.
        rows = length + 1
        ids = torch.zeros(rows, dtype=torch.int64, device=device)
        dense = torch.zeros(rows, classes, dtype=dtype, device=device)
        unit_rows = torch.float16 if dtype == torch.bfloat16 else dtype
        self.register_buffer("_embedding", torch.zeros(rows, width, dtype=unit_rows, device=device))
        self.register_buffer("_posterior", dense if posterior == "dense" else ids)
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def embedding(self) -> Tensor:
        """U: unit rows, L x d; the first `filled` are in use."""
        return self._embedding[: self.length]

    @property
    def posterior(self) -> Tensor:
        """R: L x K class probabilities, which carry their temperature for `kdav_loss`, or L class ids (int64)."""
        posterior = self._posterior[: self.length]
        if posterior.ndim == 2 and not torch.compiler.is_compiling():
            posterior.softened_by = self.temperature
        return posterior

    @torch.no_grad()
    def push(
        self, teacher_embedding: Tensor, teacher_logits_or_labels: Tensor, valid: Tensor | None = None
    ) -> None:
        """Remember a batch, gathered from all ranks in rank order when torch.distributed is up: `send` and `receive`.

        Every rank must push the same number of rows. Rows that are not valid, or whose embedding or logits
        are not finite, are left out. Of more valid rows than the ring holds, the last L are kept.

        Args:
            teacher_embedding: B x d, any length: rows are scaled to the unit sphere here.
            teacher_logits_or_labels: B x K logits, or B class ids 0 .. K - 1 ("ids" only). "ids" takes logits' argmax.
            valid: B booleans; `None` means all.

        Raises:
            InputError: shapes or kinds that do not fit this memory, or a valid row's class id outside 0 .. K - 1; on
                an accelerator such an id is an assertion that fails on the device.
        """
        self.receive(self.send(teacher_embedding, teacher_logits_or_labels, valid))

    @torch.no_grad()
    def send(
        self, teacher_embedding: Tensor, teacher_logits_or_labels: Tensor, valid: Tensor | None = None
    ) -> Gathering:
        """The first half of a `push`: the batch goes to the other ranks, and nobody waits for theirs."""
        self._check(teacher_embedding, teacher_logits_or_labels, valid)
        knowledge = teacher_logits_or_labels
        keep = teacher_embedding.isfinite().all(1)
        if knowledge.ndim == 2:
            keep &= knowledge.isfinite().all(1)
        if valid is not None:
            keep &= valid
        embedding = F.normalize(teacher_embedding.float(), dim=1).to(self._embedding.dtype)
        return Gathering(embedding, self._as_posterior(knowledge), keep)

    @torch.no_grad()
    def receive(self, batch: Gathering) -> None:
        """The second half: what every rank has sent is remembered. In the order in which it was sent."""
        embedding, posterior, keep = batch.rows()
        rank = keep.cumsum(0) - 1  # a row's place among those kept
        pushed = keep.sum()
        keep &= rank >= pushed - self.length
        slot = torch.where(keep, (self.cursor + rank) % self.length, self.length)
        self._keep(slot, self._embedding, self._posterior)
        self._keep(None, self.cursor, self.filled)
        self._embedding[slot] = embedding
        self._posterior[slot] = posterior
        # Slices: a number written to a single element would be copied from the host, which waits for the device.
        self._embedding[self.length :] = 0
        self._posterior[self.length :] = 0
        self.cursor.copy_((self.cursor + pushed) % self.length)
        self.filled.copy_((self.filled + pushed).clamp(max=self.length))

    def _as_posterior(self, knowledge: Tensor) -> Tensor:
        if self._posterior.ndim == 2:
            return torch.softmax(knowledge.float() / self.temperature, dim=1).to(self._posterior.dtype)
        return knowledge.argmax(1) if knowledge.ndim == 2 else knowledge

    def _check(self, embedding: Tensor, knowledge: Tensor, valid: Tensor | None) -> None:
        batch = embedding.shape[0]
        if embedding.shape != (batch, self.width):
            raise InputError(
                f"TeacherMemory.push: teacher_embedding has shape {tuple(embedding.shape)}; needed: B x {self.width}"
            )
        labels = knowledge.ndim == 1 and knowledge.dtype == torch.int64 and self._posterior.ndim == 1
        if knowledge.shape[0] != batch or not (labels or knowledge.shape[1:] == (self.classes,)):
            wanted = f"{batch} x {self.classes} logits"
            if self._posterior.ndim == 1:
                wanted += f" or {batch} int64 class ids"
            raise InputError(
                f"TeacherMemory.push: teacher_logits_or_labels is {knowledge.dtype} of shape "
                f"{tuple(knowledge.shape)}; needed: {wanted}"
            )
        if valid is not None:
            check_valid("TeacherMemory.push", valid, batch)
        if labels:
            counted = knowledge if valid is None else knowledge.where(valid, 0)
            reason = f"the memory has {self.classes} classes"
            check_range("TeacherMemory.push", "a class id", counted, self.classes, reason)
