"""RoIAlign (He et al., Mask R-CNN, 2017, section 3) on one feature map, on a pyramid, and on masks."""
from collections.abc import Sequence
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
        input: feature map `(N, C, H, W)`, any strides, fastest if channels_last. Half precision is
            accumulated in float32.
        rois: `(K, 5)`, rows `[image, x1, y1, x2, y2]` in pixels of the image. Not differentiable.
            Used in float32 (float64 for a float64 input), so keep them out of half precision.
        output_size: bins `(h, w)` of a RoI.
        spatial_scale: feature cells per pixel, 1 / stride.
        sampling_ratio: samples per bin along each axis, at most 4096; 0 takes `ceil(RoI cells / bins)`,
            about one a cell.
        aligned: shift by half a cell, so that pixel centres lie at .5. False is the older rule: no shift, and
            RoIs are at least one cell wide and high.

    Returns:
        `(K, C, h, w)`, contiguous, in the dtype of `input`. Samples more than one cell outside the map count
        as zero. The gradient lies in memory as `input` does. On CUDA it is summed in any order; under
        `torch.use_deterministic_algorithms` in a fixed one, which is slower.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer tensors.
        IndexError: on the CPU, when a RoI names an image outside the batch (on CUDA a device-side assert).
    """
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    return torch.ops.mmdet.roi_align(
        [input], rois, None, [spatial_scale], height, width, sampling_ratio, aligned, 0.0, None)


def mask_targets(
    pixels: Tensor, crops: Tensor, boxes: Tensor, matched: Tensor, shape: tuple[int, int], size: int
) -> Tensor:
    """`roi_align(masks, boxes, size, 1.0) >= 0.5` of masks that are kept only where they are not empty.

    What a mask head learns (Mask R-CNN, section 3.1). Sums are exact for float32 boxes.

    Args:
        pixels: `(B,)` uint8, 0 outside the object, of all crops one after another, row by row.
        crops: `(G, 5)` int64, rows `[first pixel, x1, y1, x2, y2]`: where in `pixels` a crop begins, and
            which pixels of the image it shows, all that its object has.
        boxes: `(P, 4)` xyxy in pixels of the image. Half precision is computed in float32.
        matched: `(P,)` int64, the object of each box.
        shape: (height, width) of the image.
        size: bins of a target along each axis.

    Returns:
        `(P, size, size)` bool.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on a wrong dtype. IndexError: on the CPU,
        when a box is matched with an object that is not there, or a crop leaves the image (on CUDA a
        device-side assert).
    """
    return torch.ops.mmdet.mask_targets(pixels, crops, boxes, matched, *shape, size)


def multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 0,
    finest_scale: float = 56,
    shift: float = 0.0,
    levels: Tensor | None = None,
) -> Tensor:
    """`roi_align` of each RoI on its own level of a pyramid, all in one call.

    That is the level `floor(log2(sqrt(w * h) / finest_scale + 1e-6))`, at least the first and at most the
    last (FPN, equation 1), or the given one.

    Args:
        features: levels `(N, C, H_i, W_i)` of one dtype, the finest first, on CUDA at most 8; fastest if all
            are channels_last.
        rois, output_size, sampling_ratio: as for `roi_align`.
        spatial_scales: of each level.
        finest_scale: in pixels.
        shift: cells of its level that a RoI is moved to the right and down by. 0.5 undoes the half cell of
            `aligned`, but sets no least size.
        levels: `(K,)` int64, the level of each RoI, whatever its size.

    Returns:
        `(K, C, h, w)`, contiguous; zeros for a RoI of NaN or of a level that is not there. Every level gets a
        gradient, zeros where no RoI is on it.

    Raises:
        ValueError: as `roi_align`; a `finest_scale` that is not positive; levels of different images or
            channels. TypeError: as `roi_align`; levels of different dtypes.
    """
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    return torch.ops.mmdet.roi_align(
        features, rois, levels, spatial_scales, height, width, sampling_ratio, True, shift, finest_scale)


def layout_of(x: Tensor) -> torch.memory_format:
    """In which all kernels write what is like a map `x` `(N, C, H, W)`: channels_last where x is that alone
    (maps of one channel are both), else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@torch.library.register_fake('mmdet::roi_align')
def _(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    spatial_scales: list[float],
    height: int,
    width: int,
    *rule: Any,
) -> Tensor:
    return features[0].new_empty(rois.shape[0], features[0].shape[1], height, width)


@torch.library.register_fake('mmdet::roi_align_backward')
def _(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    spatial_scales: list[float],
    sizes: list[int],
    channels_last: bool,
    *rule: Any,
) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shapes = [[*sizes[:2], *sizes[i:i + 2]] for i in range(2, len(sizes), 2)]
    return [
        torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        for shape in shapes]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, rois, levels, spatial_scales, _, _, *rule = inputs
    ctx.save_for_backward(rois, levels)
    sizes = [*features[0].shape[:2], *(size for feature in features for size in feature.shape[2:])]
    channels_last = layout_of(features[0]) is torch.channels_last  # a gradient lies like its feature map
    ctx.options = spatial_scales, sizes, channels_last, *rule


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor] | None, ...]:
    grads = torch.ops.mmdet.roi_align_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grads, *[None] * 9


torch.library.register_autograd('mmdet::roi_align', _backward, setup_context=_setup_context)


@torch.library.register_fake('mmdet::mask_targets')
def _(
    pixels: Tensor, crops: Tensor, boxes: Tensor, matched: Tensor, height: int, width: int, size: int
) -> Tensor:
    return boxes.new_empty(boxes.shape[0], size, size, dtype=torch.bool)
