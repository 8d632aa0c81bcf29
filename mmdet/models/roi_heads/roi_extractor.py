"""Features of regions, each from the pyramid level that fits its size."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import Tensor, nn

from mmdet.ops import multilevel_roi_align
from mmdet.registry import MODELS


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
        self.shift = shift

    def forward(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """Levels (N, C, H_i, W_i) and RoIs (K, 5) to (K, C, output_size, output_size)."""
        if len(features) < len(self.strides):
            raise ValueError(f'featmap_strides={self.strides}: the pyramid has {len(features)} levels')
        return multilevel_roi_align(
            features[:len(self.strides)], rois, self.output_size, [1 / s for s in self.strides],
            self.sampling_ratio, self.finest_scale, self.shift)
