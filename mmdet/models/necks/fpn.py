"""Feature pyramid network (arXiv 1612.03144)."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.conv import ConvModule
from mmdet.models.layers.norm import NormConfig
from mmdet.registry import MODELS


@MODELS.register_module()
class FPN(nn.Module):
    """Top-down pyramid: 1x1 laterals, nearest upsampling, 3x3 outputs, subsampled extra levels.

    Args:
        in_channels: channels of each backbone level.
        out_channels: channels of every output level.
        num_outs: output levels; those beyond the input's are the last one, every other pixel.
        norm_cfg: normalisation after each convolution; None for none.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        norm_cfg: NormConfig | None = None,
    ) -> None:
        super().__init__()
        if num_outs < len(in_channels):
            raise ValueError(
                f'neck.num_outs={num_outs} is less than the levels of neck.in_channels={in_channels}')
        self.in_channels = list(in_channels)
        self.num_outs = num_outs
        self.lateral_convs = nn.ModuleList(ConvModule(c, out_channels, 1, norm_cfg) for c in in_channels)
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, norm_cfg) for _ in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Levels (N, in_channels[i], H_i, W_i), fine to coarse, to (N, out_channels, H_i, W_i)."""
        channels = [x.shape[1] for x in inputs]
        if channels != self.in_channels:
            raise ValueError(f'neck.in_channels={self.in_channels}: the backbone gives {channels}')
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] += _upsample(laterals[i], laterals[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest neighbours of (N, C, H, W), in the dtype of ``x``: autocast would copy in float32."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return F.interpolate(x, size=size)
