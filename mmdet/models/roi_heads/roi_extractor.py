"""Features of regions, each from the pyramid level that fits its size."""

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from mmdet.ops import multilevel_roi_align
from mmdet.registry import MODELS
from mmdet.structures.boxes import box_area


class RoILayerConfig(TypedDict, total=False):
    """``roi_layer``: RoIAlign (arXiv 1703.06870); ``sampling_ratio`` 0 adapts to the RoI's size."""

    type: Literal['RoIAlign']
    output_size: int
    sampling_ratio: int


@MODELS.register_module()
class SingleRoIExtractor(nn.Module):
    """RoIAlign on one level a RoI (FPN, arXiv 1612.03144, equation 1).

    Args:
        roi_layer: output size and samples a bin.
        out_channels: channels of the pyramid.
        featmap_strides: of the levels used, the finest first.
        finest_scale: RoIs whose sqrt(area) is below twice this come from the finest level,
            and each doubling is one level up.
        shift: feature cells that RoIs are moved to the right and down by; RoIAlign as it was before
            its half-pixel correction is 0.5.
    """

    def __init__(
        self,
        roi_layer: RoILayerConfig,
        out_channels: int,
        featmap_strides: Sequence[int],
        finest_scale: int = 56,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.output_size = roi_layer['output_size']
        self.sampling_ratio = roi_layer.get('sampling_ratio', 0)
        self.out_channels = out_channels
        self.strides = featmap_strides
        self.finest_scale = finest_scale
        # Pixels; a buffer, since a tensor made from a list would wait for the GPU in every step.
        self.shift: Tensor
        self.register_buffer('shift', shift * torch.tensor(featmap_strides), persistent=False)

    def forward(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """Levels (N, C, H_i, W_i) and RoIs (K, 5) to (K, C, output_size, output_size)."""
        levels = self.assign_levels(rois)
        moved = torch.cat([rois[:, :1], rois[:, 1:] + self.shift[levels, None]], dim=1)
        return multilevel_roi_align(
            features[:len(self.strides)], moved, levels, self.output_size, [1 / s for s in self.strides],
            self.sampling_ratio)

    def assign_levels(self, rois: Tensor) -> Tensor:
        """Level (K,) int64 of each of RoIs (K, 5); -1, which pools zeros, where a coordinate is NaN."""
        scale = box_area(rois[:, 1:]).sqrt()
        level = torch.floor(torch.log2(scale / self.finest_scale + 1e-6))
        return level.clamp(min=0, max=len(self.strides) - 1).nan_to_num(-1).to(torch.int64)
