"""The public face of the objective: validation, the choice of an implementation, the reduction."""

import inspect
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdav_fast.kernels.caller import is_transformed, only_first_derivative, without_autocast
from kdav_fast.kernels.class_order import ClassOrder
from kdav_fast.kernels.dispatch import IMPLEMENTATIONS, choose

Reduction = Literal["mean", "none", "sum"]
Implementation = Literal["auto", "reference", "chunked", "triton", "compile"]


class KDAVResult(NamedTuple):
    """What `kdav_loss` returns."""

    loss: Tensor
    """weight_membership * membership_kl + weight_prediction * prediction_kl, reduced; differentiable."""
    membership_kl: Tensor
    """KL(q(v|x) || p(v|x)) of each row, B, in nats; detached, for logging."""
    prediction_kl: Tensor
    """T^2 KL(q(y|x) || p(y|x)) of each row, B, in nats; detached, for logging."""


def kdav_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    teacher_logits: Tensor,
    memory_embedding: Tensor,
    memory_posterior: Tensor,
    filled: int | Tensor | None = None,
    *,
    kappa_student: float = 10.0,
    kappa_teacher: float = 10.0,
    temperature: float = 1.0,
    weight_membership: float = 1.0,
    weight_prediction: float = 1.0,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    workspace_bytes: int | None = None,
    memory_order: ClassOrder | None = None,
) -> KDAVResult:
    """Knowledge distillation with an auxiliary variable (DESIGN section 2).

    The auxiliary variable v says which remembered instance an image is. Student and teacher each hold a
    von Mises-Fisher posterior over it; the first term pulls these together, the second the class
    distributions that follow from it by the law of total probability.

    Computed in float32 (float64 if any input is), forward and backward, under a caller's torch.autocast too.

    Args:
        student_embedding: z, B x d. The only argument that may require a gradient.
        teacher_embedding: t, B x d, centred if the memory's rows are.
        teacher_logits: g, B x K.
        memory_embedding: U, L x d, unit rows.
        memory_posterior: R, L x K class probabilities (floating point), or L class ids (int64) in 0 .. K - 1, which
            is not checked on an accelerator. `TeacherMemory.posterior` knows its temperature, which must be T.
        filled: how many leading rows of the memory are in use, 1..L; `None` means all. A tensor on an
            accelerator is not read back to the host, so its value is not checked.
        kappa_student, kappa_teacher: von Mises-Fisher concentrations, above 0.
        temperature: T, above 0, softens the teacher's logits.
        weight_membership, weight_prediction: weights of the two terms.
        eps: floor of p(y|x) inside the logarithm.
        reduction: over rows: "mean", "sum" or "none".
        impl: "reference" is plain torch, "compile" the same through torch.compile; "chunked" takes the memory
            in slices, on any device; "triton" fuses what stands between matrix products, for CUDA. "auto"
            picks by device, shape and dtype: see `dispatch.explain_choice`. Only "reference" has second derivatives
            (`create_graph=True`) and forward-mode ones; "auto" and "compile" take it under torch.func.
        workspace_bytes: most that "chunked" allocates for a slice of the memory, besides statistics of
            10 (d + K) values a batch row. `None` means 3/4 of a GPU's L2 cache, 64 MiB on a CPU.
        memory_order: `class_order` of these class ids and this `filled`, for "triton", which sorts them itself if it is
            `None`: worth it for several losses of one push. The other implementations do not need it.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes, devices or values that do not fit; the message names the argument.
        NotImplementedError: a derivative that `impl` does not have; raised in the backward pass if it is asked there.
    """
    _check_tensors(student_embedding, teacher_embedding, teacher_logits, memory_embedding, memory_posterior)
    filled = _check_filled(filled, memory_embedding)
    _check_posterior(memory_posterior, filled, teacher_logits.shape[1], temperature)
    positive = {
        "kappa_student": kappa_student,
        "kappa_teacher": kappa_teacher,
        "temperature": temperature,
        "eps": eps,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be above 0 and finite")
    for name, value in {
        "weight_membership": weight_membership,
        "weight_prediction": weight_prediction,
    }.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be at least 0 and finite")
    if reduction not in ("mean", "none", "sum"):
        raise ValueError(f"reduction is {reduction!r}; allowed: 'mean', 'none', 'sum'")
    if workspace_bytes is not None and not workspace_bytes > 0:
        raise ValueError(f"workspace_bytes is {workspace_bytes}; it must be above 0, or None for the default")
    given = teacher_embedding, teacher_logits, memory_embedding, memory_posterior
    tensors = student_embedding, *map(_saveable, given)
    if memory_order is not None:
        _check_order(memory_order, memory_posterior, teacher_logits.shape[1])
    name = _implementation(impl, *tensors)
    bound = {"workspace_bytes": workspace_bytes} if name == "chunked" else {}

    settings = {
        "kappa_student": float(kappa_student),
        "kappa_teacher": float(kappa_teacher),
        "temperature": float(temperature),
        "eps": float(eps),
    }
    weights = {"weight_membership": float(weight_membership), "weight_prediction": float(weight_prediction)}

    with without_autocast(student_embedding.device):
        if name == "triton":  # which weighs the terms where it forms them
            loss, membership_kl, prediction_kl = IMPLEMENTATIONS[name](
                *tensors, filled, **settings, **weights, memory_order=memory_order
            )
            only_first_derivative((loss,), name)
        else:
            membership_kl, prediction_kl = IMPLEMENTATIONS[name](*tensors, filled, **settings, **bound)
            if name != "reference":
                only_first_derivative((membership_kl, prediction_kl), name)
            loss = weights["weight_membership"] * membership_kl + weights["weight_prediction"] * prediction_kl
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return KDAVResult(loss, membership_kl.detach(), prediction_kl.detach())


def _saveable(tensor: Tensor) -> Tensor:
    """A copy of what was made in inference mode, which a backward pass may not keep."""
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


def _implementation(impl: str, student: Tensor, *others: Tensor) -> str:
    """The name in IMPLEMENTATIONS of the one to take; `ValueError` for an unknown one."""
    allowed = ("auto", *IMPLEMENTATIONS)
    if impl not in allowed:
        raise ValueError(f"impl is {impl!r}; allowed: {', '.join(map(repr, allowed))}")
    if is_transformed(student):
        if impl in ("chunked", "triton"):
            raise NotImplementedError(
                f"impl is {impl!r}, which torch.func and forward-mode derivatives cannot go through; use "
                "impl='reference', or 'auto'"
            )
        return "reference"
    return choose(student, *others) if impl == "auto" else impl


def _check_tensors(
    student: Tensor, teacher: Tensor, logits: Tensor, memory: Tensor, posterior: Tensor
) -> None:
    tensors = {
        "student_embedding": student,
        "teacher_embedding": teacher,
        "teacher_logits": logits,
        "memory_embedding": memory,
        "memory_posterior": posterior,
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device} but student_embedding on {student.device}")
        if name != "student_embedding" and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient; only student_embedding may: pass {name}.detach()")
        if name != "memory_posterior" and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be floating point")
        if name != "memory_posterior" and tensor.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have 2 dimensions")

    batch, width = student.shape
    length, classes = memory.shape[0], logits.shape[1]
    if batch == 0 or width == 0 or classes == 0:
        raise ValueError(
            f"student_embedding is {batch} x {width} and teacher_logits has {classes} classes; none of them may be 0"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_embedding has shape {tuple(teacher.shape)}; it must match student_embedding's "
            f"{tuple(student.shape)}"
        )
    if logits.shape[0] != batch:
        raise ValueError(f"teacher_logits has {logits.shape[0]} rows; student_embedding has {batch}")
    if memory.shape[1] != width:
        raise ValueError(
            f"memory_embedding has rows of width {memory.shape[1]}; student_embedding's are {width}"
        )
    if length == 0:
        raise ValueError("memory_embedding has no rows; push the teacher's batch into the memory first")
    if posterior.is_floating_point():
        if posterior.shape != (length, classes):
            raise ValueError(
                f"memory_posterior has shape {tuple(posterior.shape)}; as probabilities it must be "
                f"{length} x {classes} (memory rows x classes)"
            )
    elif posterior.dtype != torch.int64:
        raise TypeError(f"memory_posterior has dtype {posterior.dtype}; class ids must be int64")
    elif posterior.shape != (length,):
        raise ValueError(
            f"memory_posterior has shape {tuple(posterior.shape)}; class ids must be {length} values"
        )


def _check_order(order: ClassOrder, posterior: Tensor, classes: int) -> None:
    if not isinstance(order, ClassOrder) or posterior.ndim != 1:
        raise TypeError(
            f"memory_order is a {type(order).__name__}; it must be the class_order of a memory of class ids, or None"
        )
    wanted = {"rows": len(posterior), "starts": classes + 1}
    for (name, count), tensor in zip(wanted.items(), order, strict=True):
        if tensor.shape != (count,) or tensor.device != posterior.device:
            raise ValueError(
                f"memory_order.{name} has shape {tuple(tensor.shape)} on {tensor.device}; with this memory it must "
                f"have {count} values on {posterior.device}"
            )


def _check_filled(filled: int | Tensor | None, memory: Tensor) -> int | Tensor:
    length = memory.shape[0]
    if filled is None:
        return length
    if isinstance(filled, Tensor):
        if filled.numel() != 1 or filled.is_floating_point() or filled.dtype == torch.bool:
            raise TypeError(
                f"filled is a {filled.dtype} tensor of shape {tuple(filled.shape)}; it must be one integer"
            )
        if filled.device.type != "cpu":
            return filled
    if isinstance(filled, bool | float | str):
        raise TypeError(f"filled is {filled!r}; it must be one integer")
    filled = int(filled)
    if filled == 0:
        raise ValueError("filled is 0: the memory is empty; push the teacher's batch into it first")
    if not 0 < filled <= length:
        raise ValueError(f"filled is {filled}; it must be 1..{length}, the memory's rows")
    return filled


def _check_posterior(posterior: Tensor, filled: int | Tensor, classes: int, temperature: float) -> None:
    softened_by = getattr(posterior, "softened_by", temperature)
    if softened_by != temperature:
        raise ValueError(
            f"temperature is {temperature:g}, but the memory's posteriors are softened by {softened_by:g}; give "
            "both the same"
        )
    on_host = posterior.device.type == "cpu" and not torch.compiler.is_compiling()
    if not posterior.is_floating_point() and on_host:
        least, most = posterior[:filled].aminmax()
        if least < 0 or most >= classes:
            raise ValueError(
                f"memory_posterior holds class id {int(least if least < 0 else most)}; with {classes} teacher_logits a "
                f"row, ids must be 0..{classes - 1}"
            )


class KDAVLoss(nn.Module):
    """`kdav_loss` with its settings bound, as `nn.CrossEntropyLoss` is to `F.cross_entropy`."""

    def __init__(self, **settings: Any) -> None:
        """Takes `kdav_loss`'s keyword arguments; raises TypeError for any other."""
        super().__init__()
        known = inspect.signature(kdav_loss).parameters.values()
        allowed = [p.name for p in known if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in settings:
            if name not in allowed:
                raise TypeError(f"KDAVLoss has no setting {name!r}; allowed: {', '.join(allowed)}")
        self.settings = settings

    def forward(
        self,
        student_embedding: Tensor,
        teacher_embedding: Tensor,
        teacher_logits: Tensor,
        memory_embedding: Tensor,
        memory_posterior: Tensor,
        filled: int | Tensor | None = None,
    ) -> KDAVResult:
        """See `kdav_loss`."""
        tensors = (student_embedding, teacher_embedding, teacher_logits, memory_embedding, memory_posterior)
        return kdav_loss(*tensors, filled, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
