"""The two ends of a global context block (Cao et al., GCNet, 2019, section 3.4): pooling and fusion."""
from typing import Any

import torch
from torch import Tensor


def context_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Attention pooling: a 1x1 convolution to one channel, softmax over all positions, weighted mean of x.

    Args:
        x: `(N, C, H, W)`, any strides. Half precision is accumulated in float32.
        weight: `(C,)` of the convolution, any floating dtype.
        bias: `(1,)`. Its gradient is zero, since softmax does not change with it.

    Returns:
        `(N, C)` in the dtype of `x`; zeros where H * W is 0.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer tensors.
    """
    return torch.ops.mmdet.context_pool(x, weight, bias)[0]


def context_fuse(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """`x * scale + shift`, one scale and shift a channel of an image.

    Args:
        x: `(N, C, H, W)`, any strides.
        scale: `(N, C)`, any floating dtype, or None for 1.
        shift: `(N, C)`, any floating dtype, or None for 0.

    Returns:
        A new tensor like `x`, in its dtype.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer tensors.
    """
    return torch.ops.mmdet.context_fuse(x, scale, shift)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake('mmdet::context_pool')
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    return x.new_empty(n, c), x.new_empty(n, h * w, dtype=_compute_dtype(x))


@torch.library.register_fake('mmdet::context_pool_backward')
def _(grad: Tensor, x: Tensor, weight: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _setup_pool(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias = inputs
    attention = output[1]
    ctx.mark_non_differentiable(attention)
    ctx.save_for_backward(x, weight, bias, attention)


def _pool_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, attention = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.mmdet.context_pool_backward(grad, x, weight, attention)
    return grad_x, grad_weight, torch.zeros_like(bias)


torch.library.register_autograd('mmdet::context_pool', _pool_backward, setup_context=_setup_pool)


@torch.library.register_fake('mmdet::context_fuse')
def _(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake('mmdet::context_fuse_backward')
def _(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(scale)


def _setup_fuse(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    x, scale, shift = inputs
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(*(() if scale is None else (x, scale)))


def _fuse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_x, grad_scale = grad, None
    if ctx.saved_tensors:
        grad_x, grad_scale = torch.ops.mmdet.context_fuse_backward(grad, *ctx.saved_tensors)
    grad_shift = None if ctx.shift_dtype is None else grad.sum((2, 3), dtype=ctx.shift_dtype)
    return grad_x, grad_scale, grad_shift


torch.library.register_autograd('mmdet::context_fuse', _fuse_backward, setup_context=_setup_fuse)
