"""Normalisation layers built from ``norm_cfg``."""

import importlib
import importlib.util
from itertools import pairwise
from typing import Any, Literal, Required, TypedDict, TypeGuard

import torch
import torch.distributed
import torch.nn.functional as F
from mmengine import dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as CudaFunction
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmdet.ops import context_fuse


class NormConfig(TypedDict, total=False):
    """``norm_cfg``: which normalisation, and whether its scale and shift are trained."""

    type: Required[Literal['BN', 'SyncBN', 'ApexSyncBN', 'GN']]
    requires_grad: bool
    eps: float
    momentum: float
    num_groups: int


def build_norm(cfg: NormConfig, channels: int) -> nn.Module:
    """The normalisation layer of ``cfg`` for ``channels`` channels.

    Raises:
        ValueError: 'ApexSyncBN' without NVIDIA apex, 'GN' without ``num_groups``, a setting of another type.
    """
    options: dict[str, Any] = {k: v for k, v in cfg.items() if k not in ('type', 'requires_grad')}
    known = {'num_groups', 'eps'} if cfg['type'] == 'GN' else {'momentum', 'eps'}
    if cfg['type'] == 'GN' and 'num_groups' not in options:
        raise ValueError("norm_cfg.type='GN' needs norm_cfg.num_groups, which divides the channels: 32")
    if channels % options.get('num_groups', 1):
        raise ValueError(f'norm_cfg.num_groups: {options["num_groups"]} does not divide {channels} channels')
    if unknown := options.keys() - known:
        raise ValueError(f'norm_cfg.{min(unknown)}: {cfg["type"]} has {" and ".join(sorted(known))} alone')
    if cfg['type'] == 'GN':
        layer: nn.Module = nn.GroupNorm(num_channels=channels, **options)
    elif cfg['type'] == 'ApexSyncBN':
        layer = _apex_sync_batch_norm()(channels, **options)
    else:
        layer = {'BN': nn.BatchNorm2d, 'SyncBN': SyncBatchNorm}[cfg['type']](channels, **options)
    return layer.requires_grad_(cfg.get('requires_grad', True))


def is_fixed(norm: object) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    """Whether it is a batch norm in eval mode, which scales and shifts by constants."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and not norm.training


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (C,) that a batch norm in eval mode amounts to; None of any other norm."""
    if not is_fixed(norm):
        return None
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    # Rounded once, as PyTorch's batch norm does: its results are the same to the last bit.
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


def norm_relu(
    norm: nn.Module, x: Tensor, identity: Tensor | None = None, relu: bool = True
) -> Tensor:
    """``relu(norm(x) + identity)`` of (N, C, H, W); in one pass, if ``norm`` is a batch norm in eval mode.

    Of maps in oneDNN's layout (``blocked``) each has its own pass.
    """
    affine = None if x.is_mkldnn else affine_of(norm)
    if affine is None:
        x = norm(x)
        x = x if identity is None else x.add_(identity)
        return F.relu(x, inplace=True) if relu else x
    scale, shift = (part.expand(len(x), -1) for part in affine)
    return context_fuse(x, scale, shift, identity, relu)


def _apex_sync_batch_norm() -> type[nn.Module]:
    needed = "norm_cfg.type='ApexSyncBN' needs NVIDIA's apex"
    install = ('APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation '
               "git+https://github.com/NVIDIA/apex; or use type='SyncBN', which needs no package")
    found = importlib.util.find_spec('apex')
    if found is None:
        raise ValueError(f'{needed}, which is not installed (and not on PyPI): {install}')
    try:
        return importlib.import_module('apex.parallel').SyncBatchNorm
    except Exception as error:  # PyPI's apex, of another author, fails in more ways than one
        where = found.origin or list(found.submodule_search_locations or [])
        raise ValueError(f'{needed}, but {where} has no apex.parallel.SyncBatchNorm ({error}): PyPI has '
                         f'another project of that name; pip uninstall apex, then {install}') from error


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all ranks: PyTorch's on GPUs, our own on the CPU, where PyTorch has none.

    Each rank's statistics are weighted by its number of elements, so ranks may hold images of
    different size, or none at all. A step in which no rank has any leaves the running statistics alone
    (on several GPUs PyTorch takes mean and variance for 0 then). Not a subclass of nn.SyncBatchNorm,
    which DistributedDataParallel refuses on the CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f'SyncBatchNorm needs (N, C, ...), not {tuple(input.shape)}')

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...).

        Raises:
            ValueError: the input has less than two dimensions, or one process has one element a channel.
        """
        alone = dist.get_world_size() == 1
        if not self.training or (alone and input.numel()):
            return super().forward(input)  # plain batch norm
        self._check_input_dim(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        arguments = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)
        if alone or not input.is_cuda:
            return _SyncBatchNormFunction.apply(input, *arguments)
        # An empty rank sends zeros of its input's type; those of the others are at least float32.
        wide = input if input.numel() else input.to(torch.promote_types(input.dtype, torch.float32))
        group = torch.distributed.group.WORLD
        return CudaFunction.apply(wide, *arguments, group, dist.get_world_size()).to(input.dtype)


class _SyncBatchNormFunction(torch.autograd.Function):
    """Statistics in at least float32; two passes, since E[x^2] - E[x]^2 cancels."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, momentum):
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        channels = x.shape[1]
        total = torch.cat([wide.sum(dims), wide.new_tensor([x.numel() / channels])])
        dist.all_reduce(total)
        count = total[-1].clamp(min=1)
        mean = total[:-1] / count
        centred = wide - _per_channel(mean, x)
        variance = centred.square().sum(dims)
        dist.all_reduce(variance)
        variance /= count
        if total[-1]:
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


def fold_batch_norms(model: nn.Module) -> int:
    """Scale each convolution by the batch norm in eval mode that follows it, which then does nothing.

    For testing, of a model in eval mode: it saves passes over the maps, and rounds anew. What is no plain
    ``nn.Conv2d``, such as a deformable convolution, keeps its norm.

    Returns:
        The number of batch norms that were folded.
    """
    folded = 0
    for parent in model.modules():
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if type(conv) is nn.Conv2d and not conv.training and is_fixed(norm):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
                folded += 1
    return folded
