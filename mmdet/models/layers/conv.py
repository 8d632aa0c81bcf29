"""Convolution with normalisation and ReLU, and maps in the layout that oneDNN convolves."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.norm import NormConfig, build_norm, is_fixed, norm_relu
from mmdet.ops import context_fuse

# On other processors oneDNN has other layouts, or none that pays.
X86 = torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')
AVAILABLE = X86 and torch.backends.mkldnn.is_available()


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
        if self.bn is not None:
            return norm_relu(self.bn, self.conv(x), relu=self.relu)
        return conv_relu(self.conv, x, self.relu)


def conv_relu(conv: nn.Conv2d, x: Tensor, relu: bool = True) -> Tensor:
    """``relu(conv(x))`` of (N, C, H, W). On a GPU bias and ReLU are one pass, in the backward pass too."""
    if x.is_cuda and conv.bias is not None:
        x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return context_fuse(x, None, conv.bias.expand(len(x), -1), None, relu)
    x = conv(x)
    return F.relu(x, inplace=True) if relu else x


def blocked(x: Tensor, norms: Iterable[object] = ()) -> Tensor:
    """``x`` in oneDNN's layout, if it is computed without gradients, in float32 on an x86 CPU; else dense.

    There each convolution brings its input into blocks of 16 channels, and its output back. A chain of
    convolutions, ReLUs, additions and ``norms`` that keeps its maps in blocks spares that. Values are the
    same but for batch norm, which rounds otherwise. Norms other than one in eval mode need dense maps.
    """
    chained = all(norm is None or isinstance(norm, nn.Identity) or is_fixed(norm) for norm in norms)
    fit = x.device.type == 'cpu' and x.dtype == torch.float32 and x.numel() > 0
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled('cpu') or torch.compiler.is_compiling()
    if AVAILABLE and chained and fit and not plain and torch.backends.mkldnn.enabled:
        return x if x.is_mkldnn else x.to_mkldnn()
    return dense(x)


def dense(x: Tensor) -> Tensor:
    """``x`` in PyTorch's layout."""
    return x.to_dense() if x.is_mkldnn else x
