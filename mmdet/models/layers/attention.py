"""What the global context block is compared with: non-local, simplified non-local, squeeze-and-excitation."""

import torch
from torch import Tensor, nn

from mmdet.ops import context_fuse, context_pool


class NonLocal(nn.Module):
    """Embedded Gaussian non-local block (arXiv 1711.07971, section 3.3), with ``ratio * channels`` inside.

    Every position attends to all others: quadratic in their number. The last convolution starts at
    zero, so that a new block changes nothing at first.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        planes = int(channels * ratio)
        self.theta = nn.Conv2d(channels, planes, 1)
        self.phi = nn.Conv2d(channels, planes, 1)
        self.g = nn.Conv2d(channels, planes, 1)
        self.conv_out = nn.Conv2d(planes, channels, 1)
        _start_at_zero(self.conv_out)

    def forward(
        self, x: Tensor, identity: Tensor | None = None, relu: bool = False, norm: nn.Module | None = None
    ) -> Tensor:
        """(N, C, H, W) to the same shape; ``norm`` comes first, ``identity`` is added, and a ReLU last."""
        x = x if norm is None else norm(x)
        query, key, value = (conv(x).flatten(2) for conv in (self.theta, self.phi, self.g))
        attention = (query.transpose(1, 2) @ key).softmax(dim=2)
        context = (attention @ value.transpose(1, 2)).transpose(1, 2)
        added = self.conv_out(context.reshape(*context.shape[:2], *x.shape[2:]))
        return context_fuse(x, None, None, added if identity is None else added + identity, relu)


class SimplifiedNonLocal(nn.Module):
    """Non-local block with one attention map for all positions (arXiv 1904.11492, equation 4).

    The last convolution starts at zero, so that a new block changes nothing at first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.conv_value = nn.Conv2d(channels, channels, 1)
        _start_at_zero(self.conv_value)

    def forward(
        self, x: Tensor, identity: Tensor | None = None, relu: bool = False, norm: nn.Module | None = None
    ) -> Tensor:
        """(N, C, H, W) to the same shape; ``norm`` comes first, ``identity`` is added, and a ReLU last."""
        x = x if norm is None else norm(x)
        assert self.conv_mask.bias is not None
        context, x = context_pool(x, self.conv_mask.weight, self.conv_mask.bias)
        shift = self.conv_value(context[:, :, None, None].to(x.dtype)).flatten(1)
        return context_fuse(x, None, shift, identity, relu)


class SqueezeExcitation(nn.Module):
    """Channels weighed by what the whole image holds of them (arXiv 1709.01507, section 3)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        planes = int(channels * ratio)
        self.fc1 = nn.Linear(channels, planes)
        self.fc2 = nn.Linear(planes, channels)

    def forward(
        self, x: Tensor, identity: Tensor | None = None, relu: bool = False, norm: nn.Module | None = None
    ) -> Tensor:
        """(N, C, H, W) to the same shape; ``norm`` comes first, ``identity`` is added, and a ReLU last."""
        x = x if norm is None else norm(x)
        context, x = context_pool(x)
        hidden = self.fc1(context.to(x.dtype)).relu()
        return context_fuse(x, torch.sigmoid(self.fc2(hidden)), None, identity, relu)


def _start_at_zero(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
