"""Anchors on a feature pyramid (Faster R-CNN, arXiv 1506.01497, section 3.1.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdet.registry import TASK_UTILS
from mmdet.structures.boxes import tensor_like


def grid_cells(level: Tensor, dtype: torch.dtype) -> Tensor:
    """Column and row (H * W, 2) of each cell of a level (N, C, H, W), row by row."""
    height, width = level.shape[2:]
    x, y = (torch.arange(n, device=level.device, dtype=dtype) for n in (width, height))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).flatten(0, 1)


@TASK_UTILS.register_module()
class AnchorGenerator:
    """Anchors of each size and shape, centred on the top left corner of every cell.

    Args:
        strides: pixels a cell, one a level.
        ratios: height / width.
        scales: square root of an anchor's area, in strides.
    """

    def __init__(self, strides: Sequence[int], ratios: Sequence[float], scales: Sequence[float]) -> None:
        for name, values in dict(strides=strides, ratios=ratios, scales=scales).items():
            if not values or min(values) <= 0:
                raise ValueError(f'anchor_generator.{name}={values}: give one positive number or more')
        self.strides = strides
        self.ratios = ratios
        self.scales = scales

    @property
    def num_anchors(self) -> int:
        """Anchors a cell."""
        return len(self.ratios) * len(self.scales)

    def base_anchors(self, stride: int) -> Tensor:
        """The anchors (A, 4) of the cell at the origin, float64, ratio-major."""
        root = torch.tensor(self.ratios, dtype=torch.float64).sqrt()[:, None]
        scales = torch.tensor(self.scales, dtype=torch.float64)
        half_width = (stride / root * scales / 2).flatten()
        half_height = (stride * root * scales / 2).flatten()
        return torch.stack([-half_width, -half_height, half_width, half_height], dim=1)

    def grid_anchors(self, features: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Anchors (H_i * W_i * A, 4) xyxy of each level (N, C, H_i, W_i), ordered (y, x, anchor)."""
        if len(features) != len(self.strides):
            raise ValueError(f'anchor_generator.strides={self.strides} does not fit {len(features)} levels')
        anchors = []
        for stride, level in zip(self.strides, features):
            base = self.base_anchors(stride).to(level.device, dtype, non_blocking=True)
            shift = (grid_cells(level, dtype) * stride).repeat(1, 2)
            anchors.append((shift[:, None] + base).view(-1, 4))
        return anchors

    def valid_flags(self, features: list[Tensor], pad_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Which anchors (N, sum of H_i * W_i * A) of a batch belong to cells that begin in ``pad_shapes``."""
        corners = torch.cat([
            grid_cells(level, torch.float32) * stride for stride, level in zip(self.strides, features)])
        shapes = tensor_like(pad_shapes, corners).flip(1)
        return (corners < shapes[:, None]).all(dim=2).repeat_interleave(self.num_anchors, dim=1)
