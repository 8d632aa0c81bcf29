"""Boxes as offsets from other boxes (R-CNN, arXiv 1311.2524, appendix C)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmdet.registry import TASK_UTILS
from mmdet.structures.boxes import clip_boxes, tensor_like

# exp() of more would be a box 62.5 times the proposal's size.
MAX_LOG_RATIO = abs(math.log(16 / 1000))


@TASK_UTILS.register_module()
class DeltaXYWHBBoxCoder:
    """Centre offset in units of the proposal's size, and the log ratio of sizes.

    Args:
        target_means, target_stds: the deltas (dx, dy, dw, dh) are normalised with.
    """

    def __init__(
        self,
        target_means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        target_stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        self.means = target_means
        self.stds = target_stds

    def encode(self, proposals: Tensor, targets: Tensor) -> Tensor:
        """Deltas (N, 4) float32 that turn proposals (N, 4) into targets (N, 4), both xyxy with area."""
        proposals, targets = proposals.float(), targets.float()
        size = proposals[:, 2:] - proposals[:, :2]
        target_size = targets[:, 2:] - targets[:, :2]
        centre = (proposals[:, :2] + proposals[:, 2:]) * 0.5
        target_centre = (targets[:, :2] + targets[:, 2:]) * 0.5
        deltas = torch.cat([(target_centre - centre) / size, (target_size / size).log()], dim=1)
        return (deltas - tensor_like(self.means, deltas)) / tensor_like(self.stds, deltas)

    def decode(self, proposals: Tensor, deltas: Tensor, max_shape: Sequence[int] | Tensor) -> Tensor:
        """Boxes (..., 4) from proposals and deltas (..., 4), cut at (height, width) or (..., 2) of each.

        All three broadcast.
        """
        deltas = deltas * tensor_like(self.stds, deltas) + tensor_like(self.means, deltas)
        size = proposals[..., 2:] - proposals[..., :2]
        centre = (proposals[..., :2] + proposals[..., 2:]) * 0.5 + size * deltas[..., :2]
        half = size * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * 0.5
        return self.clip(torch.cat([centre - half, centre + half], dim=-1), max_shape)

    def clip(self, boxes: Tensor, max_shape: Sequence[int] | Tensor) -> Tensor:
        """Boxes (..., 4) cut off at (height, width), or (..., 2) of each."""
        return clip_boxes(boxes, max_shape)

    def to_original(self, boxes: Tensor, scale_factor: Sequence[float] | Tensor) -> Tensor:
        """Boxes (..., 4) of images resized by (w, h), or (..., 2) of each, in pixels of the original."""
        scale = tensor_like(scale_factor, boxes)
        return boxes / torch.cat([scale, scale], dim=-1)
