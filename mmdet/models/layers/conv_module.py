"""Convolution, normalisation and ReLU in one module."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.norm import NormConfig, build_norm, norm_relu


class ConvModule(nn.Module):
    """k x k convolution that keeps the size, then the norm of ``norm_cfg`` and ReLU if asked for.

    The convolution has a bias only where no norm follows. Parameter names: ``conv``, ``bn``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm_cfg: NormConfig | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm_cfg is None)
        self.bn = build_norm(norm_cfg, out_channels) if norm_cfg else None
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        x = self.conv(x)
        if self.bn is not None:
            return norm_relu(self.bn, x) if self.relu else self.bn(x)
        return F.relu(x, inplace=True) if self.relu else x
