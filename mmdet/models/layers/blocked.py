"""Maps in the layout that oneDNN convolves."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def blocked(x: Tensor, norms: Iterable[object] = ()) -> Tensor:
    """``x`` in oneDNN's layout, for a chain of convolutions and ReLUs whose ``norms`` are folded; else dense.

    On the CPU each convolution brings its input into blocks of 16 channels, and its output back. Maps that
    stay in blocks spare that, and have the same values. Without gradients, in float32.
    """
    chained = all(norm is None or isinstance(norm, nn.Identity) for norm in norms)
    if chained and x.is_mkldnn:
        return x
    fit = x.device.type == 'cpu' and x.dtype == torch.float32 and x.numel() > 0
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled('cpu') or torch.compiler.is_compiling()
    if chained and fit and not plain and torch.backends.mkldnn.is_available():
        return x.to_mkldnn()
    return dense(x)


def dense(x: Tensor) -> Tensor:
    """``x`` in PyTorch's layout."""
    return x.to_dense() if x.is_mkldnn else x
