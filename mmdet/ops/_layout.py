"""How feature maps lie in memory."""
import torch
from torch import Tensor


def layout_of(x: Tensor) -> torch.memory_format:
    """In which the kernels write what is like `x` `(N, C, H, W)`: channels_last where x is that alone, else
    contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
