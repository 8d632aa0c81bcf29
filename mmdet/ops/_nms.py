"""Non-maximum suppression, hard (greedy) and soft (Bodla et al., Soft-NMS, 2017). Not differentiable."""
import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS: visit boxes by decreasing score, drop those with IoU > `iou_threshold` with a kept one.

    Args:
        boxes: `(N, 4)` xyxy, width = x2 - x1. Half precision is computed in float32.
        scores: `(N,)`. Equal scores are visited by index; boxes whose score is NaN are never kept.
        iou_threshold: boxes of exactly this IoU stay; so do boxes without area, whose IoU is undefined.

    Returns:
        Indices of the kept boxes, int64, by decreasing score.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer boxes or scores.
    """
    return torch.ops.mmdet.nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """`nms` inside each group (class, level or image) at once; boxes of different groups never meet.

    Args:
        groups: `(N,)` int64, any values.

    Returns:
        Indices of the kept boxes of all groups together, int64, by decreasing score.
    """
    return torch.ops.mmdet.nms(boxes, scores, groups, iou_threshold)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = 'linear',
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the box of the highest score, lower the scores of those that overlap it, and repeat.

    Args:
        boxes: `(N, 4)` xyxy.
        scores: `(N,)`; NaN is never kept.
        iou_threshold: 'linear' and 'naive' touch only boxes above this IoU.
        sigma: width of 'gaussian', in squared IoU.
        min_score: boxes whose score is or falls below this are dropped.
        method: 'linear' multiplies by 1 - IoU, 'gaussian' by exp(-IoU^2 / sigma), 'naive' drops (hard NMS).

    Returns:
        Boxes `(M, 4)`, their lowered scores `(M,)` and indices `(M,)` int64, in the order of keeping.

    Raises:
        ValueError: on a wrong shape, mixed devices, an unknown method or sigma <= 0.
        TypeError: on integer boxes or scores.
    """
    kept_scores, keep = torch.ops.mmdet.soft_nms(boxes, scores, iou_threshold, sigma, min_score, method)
    return boxes[keep], kept_scores, keep


@torch.library.register_fake('mmdet::nms')
def _(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake('mmdet::soft_nms')
def _(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, method: str
) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty(kept), scores.new_empty(kept, dtype=torch.int64)
