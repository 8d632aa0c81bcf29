"""The global context block (GCNet, arXiv 1904.11492, equation 5)."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.attention import NonLocal, SimplifiedNonLocal, SqueezeExcitation
from mmdet.models.layers.conv import blocked, dense
from mmdet.models.layers.norm import affine_of
from mmdet.ops import context_fuse, context_pool, context_transform


class ContextBlockConfig(TypedDict, total=False):
    """``gcb`` of a backbone.

    ``type``: the global context block, or what the paper compares it with. ``ratio``: channels inside,
    as a share of those outside (1/16; NL: 1/2; SNL has no bottleneck). ``pooling_type`` and
    ``fusion_types`` are the GC block's. ``position`` in a residual block: after the ReLU of a
    convolution, after the norm of the last one (where nothing is said), or after the addition.
    """

    type: Literal['GC', 'NL', 'SNL', 'SE']
    ratio: float
    pooling_type: Literal['att', 'avg']
    fusion_types: Sequence[Literal['channel_add', 'channel_mul']]
    position: Literal['after_conv1', 'after_conv2', 'after_conv3', 'after_add']


OPTIONS: dict[str, set[str]] = {
    'GC': {'ratio', 'pooling_type', 'fusion_types'},
    'NL': {'ratio'},
    'SNL': set(),
    'SE': {'ratio'},
}
POSITIONS = ('after_conv1', 'after_conv2', 'after_conv3', 'after_add')


def build_context_block(cfg: ContextBlockConfig, channels: int) -> nn.Module:
    """The block that ``gcb`` describes, for ``channels`` channels.

    Raises:
        ValueError: an option that this type of block does not have, a value that an option does not
            take, or a ratio that leaves no channel.
    """
    kind = cfg.get('type', 'GC')
    if kind not in OPTIONS:
        raise ValueError(f'gcb.type={kind!r} is unknown; take one of {", ".join(OPTIONS)}')
    surplus = sorted(cfg.keys() - OPTIONS[kind] - {'type', 'position'})
    if surplus:
        raise ValueError(f'gcb.{surplus[0]} is no option of the type {kind}; leave it out')
    if cfg.get('position', POSITIONS[0]) not in POSITIONS:
        raise ValueError(f'gcb.position={cfg["position"]!r} is unknown; take one of {", ".join(POSITIONS)}')
    ratio = cfg.get('ratio', 1 / 2 if kind == 'NL' else 1 / 16)
    if int(channels * ratio) < 1:
        raise ValueError(
            f'gcb.ratio={ratio} leaves none of {channels} channels; take at least {1 / channels:.4g}')
    if ratio > 1:
        raise ValueError(f'gcb.ratio={ratio} is a share of the channels: give one up to 1, such as 1 / 16')
    if kind == 'NL':
        return NonLocal(channels, ratio)
    if kind == 'SNL':
        return SimplifiedNonLocal(channels)
    if kind == 'SE':
        return SqueezeExcitation(channels, ratio)
    fusion_types = cfg.get('fusion_types', ('channel_add',))
    return ContextBlock(channels, ratio, cfg.get('pooling_type', 'att'), fusion_types)


class ContextBlock(nn.Module):
    """One context vector for the whole image, added to (or multiplied with) every position.

    Context modelling: a 1x1 convolution gives each position a logit, a softmax over positions
    weighs the sum of their features (equation 5). Transform: a bottleneck of ``ratio * channels``
    with layer norm. Fusion: broadcast addition, and multiplication by a sigmoid gate before it if
    ``fusion_types`` has 'channel_mul'. ``pooling_type='avg'`` weighs all positions alike.

    The last convolution of the transform starts at zero: a new block changes nothing at first.
    """

    def __init__(
        self,
        channels: int,
        ratio: float,
        pooling_type: Literal['att', 'avg'] = 'att',
        fusion_types: Sequence[Literal['channel_add', 'channel_mul']] = ('channel_add',),
    ) -> None:
        super().__init__()
        planes = int(channels * ratio)
        if pooling_type not in ('att', 'avg'):
            raise ValueError(f"gcb.pooling_type={pooling_type!r} is unknown; take 'att' or 'avg'")
        if not fusion_types or not set(fusion_types) <= {'channel_add', 'channel_mul'}:
            raise ValueError(f"gcb.fusion_types={fusion_types!r}: take 'channel_add', 'channel_mul' or both")
        self.conv_mask = nn.Conv2d(channels, 1, kernel_size=1) if pooling_type == 'att' else None
        if self.conv_mask is not None:
            nn.init.kaiming_normal_(self.conv_mask.weight, mode='fan_in', nonlinearity='relu')
            nn.init.zeros_(_bias(self.conv_mask))
        self.channel_add_conv = _transform(channels, planes) if 'channel_add' in fusion_types else None
        self.channel_mul_conv = _transform(channels, planes) if 'channel_mul' in fusion_types else None

    def forward(
        self, x: Tensor, identity: Tensor | None = None, relu: bool = False, norm: nn.Module | None = None
    ) -> Tensor:
        """(N, C, H, W) to the same shape, by a pass that pools and one that does all the rest.

        With ``norm`` that comes first, with ``identity`` and ``relu`` a residual addition and a ReLU last.
        A batch norm in eval mode costs no pass and keeps no map for the backward pass.
        """
        affine = affine_of(norm) if norm is not None else None
        if norm is not None and affine is None:
            x = norm(x)
        context, x = context_pool(x, *self._logits_of(affine))
        return context_fuse(x, *self._scale_and_shift(context, affine), identity, relu)

    def after_conv(self, x: Tensor, conv: nn.Conv2d, norm: nn.Module, identity: Tensor) -> Tensor:
        """``relu(self(norm(conv(x))) + identity)`` of maps in oneDNN's layout; ``identity`` may be dense.

        ``conv`` is 1x1, ``norm`` a batch norm in eval mode or none. Both are linear: what they make of the
        pooled input is their output's context, and the input has fewer channels.
        """
        affine, matrix = affine_of(norm), conv.weight.flatten(1)
        inner, x = dense(x), conv(x)
        weight, bias = self._logits_of(affine)
        context, _ = context_pool(inner, None if weight is None else weight.flatten() @ matrix, bias)
        scale, shift = self._scale_and_shift(F.linear(context, matrix, conv.bias), affine)
        if len(x) > 1:  # a batch norm scales all images alike
            return context_fuse(dense(x), scale, shift, dense(identity), relu=True)
        zeros, ones = context.new_zeros(x.shape[1]), context.new_ones(x.shape[1])
        scale, shift = ones if scale is None else scale[0], zeros if shift is None else shift[0]
        out = F.batch_norm(x, zeros, ones, scale, shift, eps=0)
        return F.relu(out.add_(blocked(identity)), inplace=True)

    def _logits_of(self, affine: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the positions' logits, None where all weigh alike; ``affine`` comes before.

        Its shift is left out: it adds the same to all logits, which changes no softmax.
        """
        if self.conv_mask is None:
            return None, None
        weight = self.conv_mask.weight
        return weight if affine is None else weight.flatten() * affine[0], self.conv_mask.bias

    def _scale_and_shift(
        self, context: Tensor, affine: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What becomes of a map with this context (N, C), both (N, C); ``affine`` comes before."""
        scale = shift = None
        if affine is not None:
            context = torch.addcmul(affine[1], context, affine[0])
        if self.channel_mul_conv is not None:
            scale = _apply(self.channel_mul_conv, context).sigmoid()
        if self.channel_add_conv is not None:
            shift = _apply(self.channel_add_conv, context)
        if affine is not None:
            gated = affine if scale is None else (scale * affine[0], scale * affine[1])
            scale = gated[0].expand_as(context)
            shift = gated[1].expand_as(context) if shift is None else gated[1] + shift
        return scale, shift


def _transform(channels: int, planes: int) -> nn.Sequential:
    last = nn.Conv2d(planes, channels, kernel_size=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(_bias(last))
    return nn.Sequential(
        nn.Conv2d(channels, planes, kernel_size=1), nn.LayerNorm([planes, 1, 1]), nn.ReLU(inplace=True), last)


def _apply(transform: Any, context: Tensor) -> Tensor:
    """The transform of `(N, C)`."""
    first, norm, _, last = transform
    return context_transform(
        context, first.weight, first.bias, norm.weight, norm.bias, last.weight, last.bias, norm.eps)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
