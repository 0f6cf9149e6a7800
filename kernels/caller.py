"""The objective under what its caller may have on: autocast, a graph of the gradient, torch.func."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, every operation keeps the dtypes that it is given."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, `device` is the current one if it is a GPU: Triton launches on that, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices, forward and backward in their own dtype whatever autocast is on.

    A context around the forward pass does not reach torch's own backward of a product: it rounds its operands
    where the caller's `backward()` stands under autocast.
    """
    if torch.compiler.is_compiling():  # whose backward pass has no autocast
        return left @ right
    return _Product.apply(left, right)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with without_autocast(left.device):
            return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            product(grad, right.T) if ctx.needs_input_grad[0] else None,
            product(left.T, grad) if ctx.needs_input_grad[1] else None,
        )

    @staticmethod
    def jvp(ctx: Any, left_tangent: Tensor | None, right_tangent: Tensor | None) -> Tensor:
        left, right = ctx.saved_tensors
        parts = []
        if left_tangent is not None:
            parts.append(product(left_tangent, right))
        if right_tangent is not None:
            parts.append(product(left, right_tangent))
        return sum(parts)


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func (grad, vmap, jvp, hessian) or forward-mode differentiation is at work on `tensor`."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(tensor).tangent is not None


def only_first_derivative(terms: tuple[Tensor, ...], impl: str) -> None:
    """Make a backward pass through `terms` that builds a graph (`create_graph=True`) an error that names `impl`.

    Its graph would lack what the hand-written backward does: second derivatives would be wrong without a word.
    """
    if torch.compiler.is_compiling():  # torch.compile refuses by itself
        return

    def refuse(grad: Tensor) -> None:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"kdav_loss by impl '{impl}' has first derivatives only (here: create_graph=True); "
                "use impl='reference' for higher ones"
            )

    _before_backward(terms, refuse)


def only_unchanged(terms: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Make a backward pass through `terms` an error if an input was written to since: torch.compile misses some."""
    if torch.compiler.is_compiling():
        return
    seen = [(tensor, tensor._version) for tensor in inputs if not tensor.is_inference()]

    def refuse(grad: Tensor) -> None:
        for tensor, version in seen:
            if tensor._version != version:
                raise RuntimeError(
                    f"an input of kdav_loss, {tensor.dtype} of shape {tuple(tensor.shape)}, was modified between "
                    "forward and backward; call backward before the next TeacherMemory.push, or pass a clone"
                )

    _before_backward(terms, refuse)


def _before_backward(terms: tuple[Tensor, ...], check: Callable[[Tensor], None]) -> None:
    for term in terms:
        if term.requires_grad:
            term.register_hook(check)
