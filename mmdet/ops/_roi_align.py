"""RoIAlign (He et al., Mask R-CNN, 2017, section 3)."""
from typing import Any

import torch
from torch import Tensor


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Pool a fixed grid of bins from each RoI, every bin the mean of bilinear samples.

    Args:
        input: feature map `(N, C, H, W)`, any strides. Half precision is accumulated in float32.
        rois: `(K, 5)`, rows `[image, x1, y1, x2, y2]` in pixels of the image. Not differentiable.
            Used in float32 (float64 for a float64 input), so keep them out of half precision.
        output_size: bins `(h, w)` of a RoI.
        spatial_scale: feature cells per pixel, 1 / stride.
        sampling_ratio: samples per bin along each axis; 0 takes `ceil(RoI cells / bins)`, about one a cell.
        aligned: shift by half a cell, so that pixel centres lie at .5. False is the older rule: no shift, and
            RoIs are at least one cell wide and high.

    Returns:
        `(K, C, h, w)` in the dtype of `input`. Samples more than one cell outside the map count as zero.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer tensors.
        IndexError: on the CPU, when a RoI names an image outside the batch (on CUDA a device-side assert).
    """
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    return torch.ops.mmdet.roi_align(input, rois, spatial_scale, height, width, sampling_ratio, aligned)


@torch.library.register_fake('mmdet::roi_align')
def _(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1], height, width)


@torch.library.register_fake('mmdet::roi_align_backward')
def _(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    input_size: list[int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return grad.new_empty(input_size)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, rois, spatial_scale, _, _, sampling_ratio, aligned = inputs
    ctx.save_for_backward(rois)
    ctx.input_size = input.shape
    ctx.options = spatial_scale, sampling_ratio, aligned


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    spatial_scale, sampling_ratio, aligned = ctx.options
    grad_input = torch.ops.mmdet.roi_align_backward(
        grad, *ctx.saved_tensors, spatial_scale, ctx.input_size, sampling_ratio, aligned)
    return grad_input, None, None, None, None, None, None


torch.library.register_autograd('mmdet::roi_align', _backward, setup_context=_setup_context)
