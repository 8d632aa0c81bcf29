"""Free functions on boxes: Tensor (..., 4), continuous xyxy in pixels (width = x2 - x1)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Proposals(NamedTuple):
    """Boxes (K, 4) xyxy in the resized image and their scores (K,), best first."""

    boxes: Tensor
    scores: Tensor


def tensor_like(values: Sequence[Any] | Tensor, like: Tensor) -> Tensor:
    """Numbers as a tensor of the dtype and on the device of ``like``; ``new_tensor`` makes a GPU wait."""
    return torch.as_tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def box_area(boxes: Tensor) -> Tensor:
    """Areas (N,) of boxes (N, 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    top_left = torch.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    bottom_right = torch.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    return (bottom_right - top_left).clamp(min=0).prod(dim=-1)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union (N, M) of boxes1 (N, 4) and boxes2 (M, 4); 0 where both are empty."""
    inter = _intersection(boxes1, boxes2)
    union = box_area(boxes1)[:, None] + box_area(boxes2)[None] - inter
    return inter / union.clamp(min=1e-6)


def box_iof(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over the area of boxes1: (N, M) of boxes1 (N, 4) and boxes2 (M, 4)."""
    return _intersection(boxes1, boxes2) / box_area(boxes1)[:, None].clamp(min=1e-6)


def clip_boxes(boxes: Tensor, shape: Sequence[int] | Tensor) -> Tensor:
    """Boxes (..., 4) cut off at an image of ``shape`` (height, width), or (..., 2) of images each."""
    limit = tensor_like(shape, boxes).flip(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit], dim=-1))


def per_image(keep: Tensor, images: Tensor, num_images: int, most: int) -> list[Tensor]:
    """What is kept (n,) of each image, from the image (n,) of each: in the order given, the first ``most``.

    All of it if ``most`` is negative.
    """
    counts = (images[:, None] == torch.arange(num_images, device=images.device)).sum(dim=0).tolist()
    return [part if most < 0 else part[:most] for part in keep[images.argsort(stable=True)].split(counts)]


def boxes_to_rois(boxes: list[Tensor]) -> Tensor:
    """RoIs (K, 5) [image index, x1, y1, x2, y2] from a list of boxes (K_i, 4), one an image."""
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])
