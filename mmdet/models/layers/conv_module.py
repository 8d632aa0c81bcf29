"""Convolution, normalisation and ReLU in one module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.norm import NormConfig, build_norm


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
        x = conv_norm(self.conv, self.bn, x) if self.bn is not None else self.conv(x)
        return F.relu(x, inplace=True) if self.relu else x


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, in one convolution where the norm is a batch norm in eval mode.

    Its scale and shift are constants then, or parameters that the loss reaches through the scaled weight
    (arXiv 2305.11624, section 3.2): no pass over the map, and none kept for the backward pass. A convolution
    of another kind than ``nn.Conv2d`` without bias is followed by the norm.
    """
    if (not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.training
            or type(conv) is not nn.Conv2d or conv.bias is not None):
        return norm(conv(x))
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, shift = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
