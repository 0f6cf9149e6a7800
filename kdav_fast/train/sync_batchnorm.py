"""BatchNorm over the whole batch of a run, not over each process's share of it; on CPUs too."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from kdav_fast.errors import InputError


def synchronize_batchnorm(module: nn.Module) -> nn.Module:
    """Let every BatchNorm in `module` take its statistics from all ranks' rows.

    For training; in evaluation mode, or alone, the layers stay what they were. On a GPU `nn.SyncBatchNorm` does
    the work; as it refuses CPU tensors, a CPU gets an implementation of its own. Ranks may have different
    numbers of rows, but all must run the same layers, forward and backward: each forward pass waits for one
    all-gather of 2C + 1 numbers a layer of C channels, each backward pass for one all-reduce of 2C.

    Args:
        module: changed in place: its layers get another class, while every module, parameter, buffer and hook
            remains the same object. Layers take inputs of shape B x C or B x C x ..., as before, and raise
            `ValueError` for a batch of one value a channel over all ranks (on a GPU they do not notice).

    Returns:
        `module`.

    Raises:
        InputError: a subclass of BatchNorm that is not known here; nothing is changed.
    """
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    for path, layer in layers:
        if type(layer) not in _SYNCHRONIZED:
            raise InputError(
                f"{path or 'the module'} is a {type(layer).__name__}, whose statistics cannot be synchronised; "
                "set train.sync_batchnorm=false or choose another network"
            )
    for _, layer in layers:
        layer.__class__ = _SYNCHRONIZED[type(layer)]
        layer.process_group = None  # nn.SyncBatchNorm's: the default group
    return module


class _SyncBatchNorm(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` that works on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return _BatchNorm.forward(self, x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = x.new_ones(x.shape[1]) if self.weight is None else self.weight
        bias = x.new_zeros(x.shape[1]) if self.bias is None else self.bias
        output, mean, variance, rows = _BatchNormOverRanks.apply(
            x.to(dtype), weight.to(dtype), bias.to(dtype), self.eps
        )
        if self.track_running_stats:
            self._track(mean, variance * rows / (rows - 1))
        return output.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _SyncBatchNormAct(SyncBatchNormAct, _SyncBatchNorm):
    """In this order timm's forward, which adds dropout and activation, calls the forward above."""


_SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _SyncBatchNorm,
    nn.BatchNorm2d: _SyncBatchNorm,
    nn.BatchNorm3d: _SyncBatchNorm,
    nn.SyncBatchNorm: _SyncBatchNorm,
    _SyncBatchNorm: _SyncBatchNorm,
    BatchNormAct2d: _SyncBatchNormAct,
    SyncBatchNormAct: _SyncBatchNormAct,
    _SyncBatchNormAct: _SyncBatchNormAct,
}


class _BatchNormOverRanks(torch.autograd.Function):
    """BatchNorm of B x C x ..., all in one dtype; also its mean, variance and number of rows (float64).

    A row is one value of each channel: an image has one for every pixel.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        dims = _all_but_channels(x)
        # Relative to a point next to the mean: far from zero, float32 has no digits left for the deviations, nor
        # for a variance from sums of squares.
        origin = x.sum(dims) / max(rows, 1)
        x = x - _per_channel(origin, x)
        offset = x.sum(dims) / max(rows, 1)
        squares = (x.square().sum(dims) - rows * offset.square()).clamp(min=0)

        own = torch.cat([origin.double() + offset, squares, origin.new_tensor([rows], dtype=torch.float64)])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        means, squares, rows = torch.stack(gathered).split([channels, channels, 1], dim=1)
        total = rows.sum()
        if total < 2:
            raise ValueError(
                "BatchNorm needs more than 1 value a channel in training, counted over all ranks"
            )
        mean = (rows * means).sum(0) / total
        variance = (squares + rows * (means - mean).square()).sum(0) / total

        offset, spread = (mean - origin).to(x.dtype), variance.to(x.dtype)
        ctx.save_for_backward(x, weight, offset, spread, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(x, offset, spread, weight, bias, eps=eps), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, total = ctx.saved_tensors
        dims = _all_but_channels(x)
        inverse = (variance + ctx.eps).rsqrt()
        grad_bias = grad.sum(dims)
        grad_weight = ((grad * x).sum(dims) - mean * grad_bias) * inverse
        sums = torch.cat([grad_weight, grad_bias])
        dist.all_reduce(sums)
        # Scaling or shifting the whole batch leaves the output as it was: the gradient has no part along either.
        scale, shift = (sums / total).chunk(2)
        grad_x = grad - F.batch_norm(x, mean, variance, scale, shift, eps=ctx.eps)
        return grad_x * _per_channel(weight * inverse, x), grad_weight, grad_bias, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """C values, shaped to meet those of `x`, B x C x ..."""
    return values.view(-1, *[1] * (x.ndim - 2))
