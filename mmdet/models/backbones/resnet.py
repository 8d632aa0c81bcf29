"""ResNet (arXiv 1512.03385) and ResNeXt (1611.05431), with context blocks (1904.11492) in chosen stages."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdet.models.layers.context_block import ContextBlock, ContextBlockConfig, build_context_block
from mmdet.models.layers.conv import blocked, dense
from mmdet.models.layers.deform_conv import DeformConv2d, DeformConvConfig
from mmdet.models.layers.norm import NormConfig, build_norm, freeze_norm_statistics, norm_relu
from mmdet.registry import MODELS


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the residual addition (ResNet-18 and 34)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        norm_cfg: NormConfig,
        gcb: ContextBlockConfig | None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = build_norm(norm_cfg, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = build_norm(norm_cfg, planes)
        self.downsample = _downsample(in_channels, planes, stride, norm_cfg)
        self.context_at = gcb.get('position', 'after_conv2') if gcb else None
        if self.context_at == 'after_conv3':
            raise ValueError("gcb.position='after_conv3': blocks of ResNet-18 and 34 have two convolutions")
        if gcb:
            self.context_block = build_context_block(gcb, planes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, planes, H / stride, W / stride)."""
        x = blocked(x, [self.bn1]) if self.context_at is None else dense(x)
        identity = _shortcut(self.downsample, x)
        out = norm_relu(self.bn1, self.conv1(x))
        if self.context_at == 'after_conv1':
            out = self.context_block(out)
        out = self.conv2(out)
        if self.context_at == 'after_conv2':
            return self.context_block(out, identity, relu=True, norm=self.bn2)
        if self.context_at == 'after_add':
            return self.context_block(self.bn2(out) + identity, relu=True)
        return norm_relu(self.bn2, out, identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and the residual addition (ResNet-50 and deeper).

    The 3x3 convolution has ``groups`` groups of ``base_width * planes / 64`` channels (ResNeXt), and
    is deformable with ``dcn``. The context block comes where ``gcb`` says, else after the last
    convolution's norm, before the addition.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        norm_cfg: NormConfig,
        gcb: ContextBlockConfig | None,
        style: Literal['pytorch', 'caffe'] = 'pytorch',
        groups: int = 1,
        base_width: int = 64,
        dcn: DeformConvConfig | None = None,
    ) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        width = planes * base_width // 64 * groups
        # torchvision's weights have the stride in the 3x3 convolution, Caffe's in the first 1x1.
        stride1, stride2 = (1, stride) if style == 'pytorch' else (stride, 1)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride1, bias=False)
        self.bn1 = build_norm(norm_cfg, width)
        self.conv2: nn.Module
        if dcn:
            self.conv2 = DeformConv2d(
                width, width, stride2, groups, dcn['type'] == 'DCNv2', dcn.get('deform_groups', 1))
        else:
            self.conv2 = nn.Conv2d(width, width, 3, stride=stride2, padding=1, groups=groups, bias=False)
        self.bn2 = build_norm(norm_cfg, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = build_norm(norm_cfg, out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride, norm_cfg)
        self.context_at = gcb.get('position', 'after_conv3') if gcb else None
        inside = self.context_at in ('after_conv1', 'after_conv2')
        if gcb:
            self.context_block = build_context_block(gcb, width if inside else out_channels)
        self.chained = not dcn and not inside

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 * planes, H / stride, W / stride)."""
        # A context block may leave x dense. To bring it into blocks is a copy, and conv1's output is smaller.
        late = self.chained and self.context_at and not x.is_mkldnn
        inner = blocked(x, [self.bn1]) if self.chained and not late else dense(x)
        identity = _shortcut(self.downsample, inner)
        out = self.conv1(inner)
        out = norm_relu(self.bn1, blocked(out, [self.bn1]) if late else out)
        if self.context_at == 'after_conv1':
            out = self.context_block(out)
        out = norm_relu(self.bn2, self.conv2(out))
        if self.context_at == 'after_conv2':
            out = self.context_block(out)
        if self.context_at == 'after_conv3':
            if out.is_mkldnn and isinstance(self.context_block, ContextBlock):
                return self.context_block.after_conv(out, self.conv3, self.bn3, identity)
            return self.context_block(dense(self.conv3(out)), dense(identity), relu=True, norm=self.bn3)
        out = self.conv3(out)
        if self.context_at == 'after_add':
            return self.context_block(self.bn3(dense(out)) + dense(identity), relu=True)
        return norm_relu(self.bn3, out, identity)


def _downsample(
    in_channels: int, out_channels: int, stride: int, norm_cfg: NormConfig
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        build_norm(norm_cfg, out_channels))


def _shortcut(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    """What is added to a block's branch: ``x``, or what ``downsample`` makes of it."""
    if downsample is None:
        return x
    conv, norm = downsample
    return norm_relu(norm, conv(x), relu=False)


class Stage(nn.Sequential):
    """The blocks of one resolution; ``with_cp`` has each computed once more in the backward pass."""

    with_cp = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H_in, W_in) to (N, C_out, H, W), which for hooks are in PyTorch's layout."""
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if self.with_cp and self.training else block(x)
        return dense(x) if self._forward_hooks else x


def _max_pool(x: Tensor) -> Tensor:
    """3x3 max pooling with stride 2 of (N, C, H, W)."""
    if x.requires_grad or x.is_cuda:
        return F.max_pool2d(x, 3, stride=2, padding=1)
    # On the CPU comparing whole rows, then columns, is several times as fast; ties would share a gradient.
    height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    x = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    above, row, below = (x[:, :, i:i + 2 * height:2] for i in range(3))
    x = torch.maximum(torch.maximum(above, row), below)
    left, column, right = (x[..., i:i + 2 * width:2] for i in range(3))
    return torch.maximum(torch.maximum(left, column), right)


ARCHITECTURES: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _checked_stages(name: str, part: Any, stages: Sequence[Any] | None) -> Sequence[Any]:
    """``stages``, or four times False for None; a ValueError where part and stages do not go together."""
    if stages is None:
        if part is not None:
            raise ValueError(f'backbone.{name} is given without backbone.stage_with_{name}: set that too, '
                             'such as (False, True, True, True) for c3 .. c5')
        return (False,) * 4
    if len(stages) != 4:
        raise ValueError(f'backbone.stage_with_{name}={stages}: give four values, for c2 .. c5')
    if any(stages) and part is None:
        raise ValueError(
            f'backbone.stage_with_{name}={stages} asks for what backbone.{name}=None lacks; set both')
    return stages


@MODELS.register_module(name=['ResNet', 'ResNeXt'])
class ResNet(nn.Module):
    """ResNet of depth 18, 34, 50, 101 or 152; ResNeXt with ``groups`` (32x4d: groups 32, base_width 4).

    Args:
        depth: number of layers.
        norm_cfg: normalisation of the whole backbone.
        norm_eval: keep batch norm in eval mode while training ("fixed BN": the running
            statistics of the pretrained weights stay; scale and shift are trained).
        frozen_stages: stages that are not trained, from the stem (0) on; -1 trains all.
        gcb: context block, built in the stages of ``stage_with_gcb``; None for none.
        stage_with_gcb: for c2, c3, c4, c5: all their blocks, none, or those of a tuple of indices
            (-1 is the last).
        dcn: deformable 3x3 convolutions, in the stages of ``stage_with_dcn``; None for none.
        stage_with_dcn: for c2, c3, c4, c5.
        groups, base_width: groups of the 3x3 convolutions, and channels a group in c2.
        out_indices: which of c2 .. c5 (0 .. 3) are returned; later stages are neither run nor trained.
        style: 'pytorch' has the stride in the 3x3 convolution, 'caffe' in the 1x1 before it.
        zero_init_residual: start each residual branch at zero.
        with_cp: keep but the input of each block for the backward pass and compute the block once more
            there: less memory, more time. For norms whose statistics are fixed, or GN: a second pass
            would count a batch twice.
        pretrained: 'torchvision://resnet50' or a file, loaded when training starts; None
            starts from random weights.
    """

    def __init__(
        self,
        depth: int,
        norm_cfg: NormConfig | None = None,
        norm_eval: bool = True,
        frozen_stages: int = -1,
        gcb: ContextBlockConfig | None = None,
        stage_with_gcb: Sequence[bool | Sequence[int]] | None = None,
        dcn: DeformConvConfig | None = None,
        stage_with_dcn: Sequence[bool] | None = None,
        groups: int = 1,
        base_width: int = 64,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: Literal['pytorch', 'caffe'] = 'pytorch',
        zero_init_residual: bool = True,
        with_cp: bool = False,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        if depth not in ARCHITECTURES:
            raise ValueError(f'backbone.depth={depth}: ResNet has the depths {list(ARCHITECTURES)}')
        gcb_stages = _checked_stages('gcb', gcb, stage_with_gcb)
        dcn_stages = _checked_stages('dcn', dcn, stage_with_dcn)
        if not -1 <= frozen_stages <= 4:
            raise ValueError(f'backbone.frozen_stages={frozen_stages}: from -1 (none) to 4 (c5)')
        if not out_indices or not set(out_indices) <= {0, 1, 2, 3}:
            raise ValueError(f'backbone.out_indices={out_indices}: give some of 0 .. 3, for c2 .. c5')
        norm_cfg = norm_cfg or NormConfig(type='BN')
        block, num_blocks = ARCHITECTURES[depth]
        if block is BasicBlock and (groups > 1 or dcn or style == 'caffe'):
            raise ValueError(f'backbone.depth={depth}: groups, dcn and the caffe style need depth 50 or more')
        if with_cp and not norm_eval and norm_cfg['type'] != 'GN':
            raise ValueError('backbone.with_cp=True needs norm_eval=True: the blocks run twice, and would '
                             'count each batch twice in the running statistics')
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self.out_indices = out_indices
        self.pretrained = pretrained

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = build_norm(norm_cfg, 64)
        channels = 64
        for i in range(4):
            planes = 64 * 2**i
            blocks: list[nn.Module] = []
            for j in range(num_blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                chosen = gcb_stages[i]
                if not isinstance(chosen, bool):
                    if wrong := [k for k in chosen if not -num_blocks[i] <= k < num_blocks[i]]:
                        raise ValueError(f'backbone.stage_with_gcb names block {wrong[0]} of c{i + 2}, '
                                         f'which has {num_blocks[i]}')
                    chosen = j in chosen or j - num_blocks[i] in chosen
                stage_gcb = gcb if chosen else None
                stage_dcn = dcn if dcn_stages[i] else None
                if block is Bottleneck:
                    blocks.append(Bottleneck(
                        channels, planes, stride, norm_cfg, stage_gcb, style, groups, base_width, stage_dcn))
                else:
                    blocks.append(BasicBlock(channels, planes, stride, norm_cfg, stage_gcb))
                channels = planes * block.expansion
            stage = Stage(*blocks)
            stage.with_cp = with_cp
            self.add_module(f'layer{i + 1}', stage)
        self._init_weights(zero_init_residual)
        for module in [*self._frozen(), *self._stages()[max(out_indices) + 1:]]:
            module.requires_grad_(False)

    def _init_weights(self, zero_init_residual: bool) -> None:
        for name, module in self.named_modules():
            # Context blocks and deformable convolutions start their own way: as nothing new.
            if isinstance(module, nn.Conv2d) and 'context_block' not in name and 'conv_offset' not in name:
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                last_norm: Any = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last_norm.weight)

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.conv1, self.bn1, *self._stages()[:self.frozen_stages]]

    def _stages(self) -> list[Any]:
        return [self.get_submodule(f'layer{i}') for i in range(1, 5)]

    def train(self, mode: bool = True) -> 'ResNet':
        """Training mode, but for the frozen stages and (``norm_eval``) the batch norms."""
        super().train(mode)
        for module in [self] if self.norm_eval else self._frozen():
            freeze_norm_statistics(module)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) to c2 .. c5, (N, C_i, H / stride_i, W / stride_i), strides 4 .. 32."""
        x = _max_pool(norm_relu(self.bn1, self.conv1(x)))
        outputs = []
        for stage in self._stages()[:max(self.out_indices) + 1]:
            x = stage(x)
            outputs.append(dense(x))
        return [outputs[i] for i in self.out_indices]
