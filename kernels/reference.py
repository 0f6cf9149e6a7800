"""The objective in plain torch: the definition that every other implementation is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdav_fast.kernels.caller import product


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: half-precision inputs are widened, never accumulated in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def reference_terms(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    teacher_logits: Tensor,
    memory_embedding: Tensor,
    memory_posterior: Tensor,
    filled: int | Tensor,
    *,
    kappa_student: float,
    kappa_teacher: float,
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Both divergences per row (DESIGN section 2), differentiable in `student_embedding`.

    Arguments are those of `kdav_loss`, already validated. A tensor `filled` masks the unused rows on the
    device instead of slicing them off, so that the host need not wait for its value.

    Returns:
        membership_kl and prediction_kl, B each, in float64 if any input is float64, else float32.
    """
    dtype = compute_dtype(student_embedding, teacher_embedding, teacher_logits, memory_embedding)
    mask = None
    if isinstance(filled, int):
        memory_embedding, memory_posterior = memory_embedding[:filled], memory_posterior[:filled]
    else:
        mask = torch.arange(memory_embedding.shape[0], device=memory_embedding.device) < filled

    memory = memory_embedding.to(dtype)
    log_p_member = _log_membership(student_embedding.to(dtype), memory, kappa_student, mask)
    log_q_member = _log_membership(teacher_embedding.to(dtype), memory, kappa_teacher, mask)
    membership = log_q_member.exp() * (log_q_member - log_p_member)
    if mask is not None:
        membership = torch.where(mask, membership, 0.0)  # -inf - -inf in the unused columns

    p_class = _total_probability(log_p_member.exp(), memory_posterior, teacher_logits.shape[1], dtype)
    q_class = torch.softmax(teacher_logits.to(dtype) / temperature, dim=1)
    prediction = torch.xlogy(q_class, q_class) - q_class * p_class.clamp(min=eps).log()
    return membership.sum(1), temperature**2 * prediction.sum(1)


def _log_membership(embedding: Tensor, memory: Tensor, kappa: float, mask: Tensor | None) -> Tensor:
    """log p(v=j | x) under equal von Mises-Fisher likelihoods and a uniform prior, B x n."""
    similarity = product(kappa * F.normalize(embedding, dim=1), memory.T)
    if mask is not None:
        similarity = similarity.masked_fill(~mask, -torch.inf)
    return torch.log_softmax(similarity, dim=1)


def _total_probability(p_member: Tensor, posterior: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """p(y | x) = sum_j p(v=j | x) R_j(y), B x K; R as rows of probabilities or as one class id a row."""
    if posterior.ndim == 2:
        return product(p_member, posterior.to(dtype))
    p_class = p_member.new_zeros(p_member.shape[0], classes)
    return p_class.index_add(1, posterior, p_member)
