"""Maps in the layout that oneDNN convolves."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmdet.models.layers.norm import is_fixed

# On other processors oneDNN has other layouts, or none that pays.
X86 = torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')
AVAILABLE = X86 and torch.backends.mkldnn.is_available()


def blocked(x: Tensor, norms: Iterable[object] = ()) -> Tensor:
    """``x`` in oneDNN's layout, if it is computed without gradients, in float32 on an x86 CPU; else dense.

    There each convolution brings its input into blocks of 16 channels, and its output back. A chain of
    convolutions, ReLUs, additions and ``norms`` that keeps its maps in blocks spares that. Values are the
    same but for batch norm, which rounds otherwise. Norms other than one in eval mode need dense maps.
    """
    chained = all(norm is None or isinstance(norm, nn.Identity) or is_fixed(norm) for norm in norms)
    fit = x.device.type == 'cpu' and x.dtype == torch.float32 and x.numel() > 0
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled('cpu') or torch.compiler.is_compiling()
    if AVAILABLE and chained and fit and not plain:
        return x if x.is_mkldnn else x.to_mkldnn()
    return dense(x)


def dense(x: Tensor) -> Tensor:
    """``x`` in PyTorch's layout."""
    return x.to_dense() if x.is_mkldnn else x
