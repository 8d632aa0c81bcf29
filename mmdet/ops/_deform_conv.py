"""Deformable convolution (arXiv 1703.06211, equation 3), with a mask the modulated one (arXiv 1811.11168)."""
from typing import Any

import torch
from torch import Tensor

from ._roi_align import layout_of


def deform_conv2d(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: int = 1, padding: int = 0
) -> Tensor:
    """A convolution whose taps read `x` at the positions of their grid moved by `offset`, bilinearly.

    On the CPU alone, where torchvision's takes several times as long.

    Args:
        x: `(N, C, H, W)`, float32 or float64, as all inputs; zeros outside the map.
        offset: `(N, parts * kh * kw * 2, out_h, out_w)`, dy and dx in cells of each tap, of each of the parts
            into which the channels are divided.
        mask: `(N, parts * kh * kw, out_h, out_w)`, what a tap's sample is multiplied with; None for 1.
        weight: `(out, C / groups, kh, kw)`, which says the number of groups.
        stride, padding: of both axes.

    Returns:
        `(N, out, out_h, out_w)`, in memory as `x`.

    Raises:
        ValueError: on a wrong shape. TypeError: on another dtype.
        NotImplementedError: on another device.
    """
    return torch.ops.mmdet.deform_conv2d(x, offset, mask, weight, stride, padding)


@torch.library.register_fake('mmdet::deform_conv2d')
def _(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: int, padding: int
) -> Tensor:
    size = x.shape[0], weight.shape[0], *offset.shape[2:]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


@torch.library.register_fake('mmdet::deform_conv2d_backward')
def _(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty_like(x, memory_format=layout_of(x)), offset.new_empty(offset.shape),
            x.new_empty(0) if mask is None else mask.new_empty(mask.shape), weight.new_empty(weight.shape))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, mask, weight = ctx.saved_tensors
    grad_x, grad_offset, grad_mask, grad_weight = torch.ops.mmdet.deform_conv2d_backward(
        grad, x, offset, mask, weight, ctx.stride, ctx.padding)
    return grad_x, grad_offset, None if mask is None else grad_mask, grad_weight, None, None


torch.library.register_autograd('mmdet::deform_conv2d', _backward, setup_context=_setup_context)
