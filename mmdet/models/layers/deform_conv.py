"""Deformable convolution (DCN, arXiv 1703.06211; modulated: DCNv2, arXiv 1811.11168)."""

import math
from typing import Literal, Required, TypedDict

import torch
import torchvision
from torch import Tensor, nn

from mmdet.ops import deform_conv2d


class DeformConvConfig(TypedDict, total=False):
    """``dcn`` of a backbone: 'DCN', or 'DCNv2' for the modulated one, and its number of offset groups."""

    type: Required[Literal['DCN', 'DCNv2']]
    deform_groups: int


class DeformConv2d(nn.Module):
    """3x3 convolution that samples at learned offsets, without bias.

    A convolution ``conv_offset`` of the same input predicts, for each of the 9 taps of each offset
    group, dy and dx in pixels, and if modulated a weight. It starts at zero: a new layer is a plain
    convolution (times a half if modulated).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, groups: int, modulated: bool,
        deform_groups: int,
    ) -> None:
        super().__init__()
        if in_channels % deform_groups:
            raise ValueError(f'dcn.deform_groups={deform_groups} does not divide the {in_channels} channels')
        self.stride = stride
        self.modulated = modulated
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        offsets = deform_groups * 9 * (3 if modulated else 2)
        self.conv_offset = nn.Conv2d(in_channels, offsets, 3, stride=stride, padding=1)
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        # The operators compute in one dtype, and know no half precision on the CPU.
        dtype = torch.promote_types(x.dtype, torch.float32)
        offset, mask = self.conv_offset(x).to(dtype), None
        if self.modulated:
            offset, mask = offset.split([offset.shape[1] // 3 * 2, offset.shape[1] // 3], dim=1)
            mask = mask.sigmoid()
        wide, weight = x.to(dtype), self.weight.to(dtype)
        if x.device.type == 'cpu':
            out = deform_conv2d(wide, offset, mask, weight, self.stride, padding=1)
        else:
            out = torchvision.ops.deform_conv2d(
                wide, offset, weight, stride=self.stride, padding=1, mask=mask)
        return out.to(x.dtype)
