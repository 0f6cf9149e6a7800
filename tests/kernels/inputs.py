"""Inputs for the loss and the device that the kernels run on."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(
    batch=5, width=8, length=12, classes=4, *, ids=False, seed=0, dtype=torch.float64, device="cpu"
) -> list[Tensor]:
    """Random z, t, g, U (unit rows) and R (class ids if `ids`), drawn in float64, in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    memory = torch.nn.functional.normalize(normal(length, width), dim=1)
    if ids:
        posterior = torch.randint(classes, (length,), generator=generator)
    else:
        posterior = torch.softmax(normal(length, classes), dim=1)
    tensors = [normal(batch, width), normal(batch, width), normal(batch, classes), memory, posterior]
    return [t.to(device, dtype if t.is_floating_point() else None) for t in tensors]


def values_and_gradient(loss, tensors, *args, upstream=None, **keywords) -> list[Tensor]:
    """Both terms of each row and the gradient in z, float64 on the CPU, of `loss` (kdav_loss or alike).

    `upstream` weighs the rows of the loss; they are not uniform by default.
    """
    student = tensors[0].detach().clone().requires_grad_()
    out = loss(student, *tensors[1:], *args, reduction="none", **keywords)
    if upstream is None:
        upstream = torch.linspace(0.5, 2.0, len(student))
    (out.loss * upstream.to(out.loss)).sum().backward()
    return [t.detach().double().cpu() for t in (out.membership_kl, out.prediction_kl, student.grad)]
