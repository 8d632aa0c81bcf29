"""Normalisation layers built from ``norm_cfg``."""

from typing import Any, Literal, Required, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn


class NormConfig(TypedDict, total=False):
    """``norm_cfg``: which normalisation, and whether its scale and shift are trained."""

    type: Required[Literal['BN', 'SyncBN', 'GN']]
    requires_grad: bool
    eps: float
    momentum: float
    num_groups: int


def build_norm(cfg: NormConfig, channels: int) -> nn.Module:
    """The normalisation layer of ``cfg`` for ``channels`` channels."""
    options: dict[str, Any] = {k: v for k, v in cfg.items() if k not in ('type', 'requires_grad')}
    if cfg['type'] == 'GN':
        layer: nn.Module = nn.GroupNorm(num_channels=channels, **options)
    else:
        layer = {'BN': nn.BatchNorm2d, 'SyncBN': SyncBatchNorm}[cfg['type']](channels, **options)
    return layer.requires_grad_(cfg.get('requires_grad', True))


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch normalisation over all ranks, which PyTorch has for GPUs only; here for the CPU too.

    Each rank's statistics are weighted by its number of elements, so ranks may hold images of
    different size, or none at all.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...)."""
        # PyTorch's refuses the CPU in a process group of one, too.
        if input.is_cuda or not (self.training and dist.is_initialized()):
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        return _SyncBatchNormFunction.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)


class _SyncBatchNormFunction(torch.autograd.Function):
    """Statistics in at least float32; two passes, since E[x^2] - E[x]^2 cancels."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, momentum):
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        channels = x.shape[1]
        total = torch.cat([wide.sum(dims), wide.new_tensor([x.numel() / channels])])
        dist.all_reduce(total)
        count = total[-1]
        mean = total[:-1] / count
        centred = wide - _per_channel(mean, x)
        variance = centred.square().sum(dims)
        dist.all_reduce(variance)
        variance /= count
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        inv_std = torch.rsqrt(variance + eps)
        normalised = centred * _per_channel(inv_std, x)
        ctx.save_for_backward(normalised, weight, inv_std, count)
        return (normalised * _per_channel(weight, x) + _per_channel(bias, x)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        normalised, weight, inv_std, count = ctx.saved_tensors
        dims = [d for d in range(grad.dim()) if d != 1]
        wide = grad.to(normalised.dtype)
        # DDP averages the gradients of weight and bias over ranks, so theirs stay local.
        grad_bias, grad_weight = wide.sum(dims), (wide * normalised).sum(dims)
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        mean_grad, mean_product = sums / count
        grad_x = wide - _per_channel(mean_grad, grad) - normalised * _per_channel(mean_product, grad)
        grad_x *= _per_channel(weight * inv_std, grad)
        return (grad_x.to(grad.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype),
                None, None, None, None)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def freeze_norm_statistics(module: nn.Module) -> None:
    """Put every batch norm under ``module`` in eval mode: running statistics are used and kept."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()

