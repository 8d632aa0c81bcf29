"""Convolution modules; what stays in oneDNN's layout, and that it has the values of PyTorch's."""
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmdet.models.backbones.resnet import ResNet
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.layers.conv import ConvModule, blocked, dense
from mmdet.models.layers.norm import NormConfig, fold_batch_norms
from mmdet.models.roi_heads.bbox_head import ConvFCBBoxHead
from mmdet.models.roi_heads.mask_head import FCNMaskHead

GCB: dict[str, Any] = dict(ratio=1 / 4)


@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_without_norm(kernel_size: int, relu: bool) -> None:
    module = ConvModule(4, 6, kernel_size, relu=relu)
    assert [name for name, _ in module.named_parameters()] == ['conv.weight', 'conv.bias']
    x = torch.randn(2, 4, 5, 7)
    expected = F.conv2d(x, module.conv.weight, module.conv.bias, padding=kernel_size // 2)
    torch.testing.assert_close(module(x), expected.relu() if relu else expected)


def test_norm_takes_the_place_of_the_bias() -> None:
    module = ConvModule(4, 6, 3, dict(type='BN'), relu=True)
    assert [name for name, _ in module.named_parameters()] == ['conv.weight', 'bn.weight', 'bn.bias']
    x = torch.randn(2, 4, 5, 7)
    out = F.conv2d(x, module.conv.weight, padding=1)
    variance = out.var((0, 2, 3), correction=0, keepdim=True)
    expected = (out - out.mean((0, 2, 3), True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(module(x), expected.relu(), rtol=1e-4, atol=1e-5)


def test_half_of_a_relus_variance_is_made_good() -> None:
    weight = ConvModule(64, 128, 3).conv.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.onednn
@torch.no_grad()
def test_there_and_back() -> None:
    x = torch.randn(2, 5, 3, 4)
    there = blocked(x, [None, nn.Identity()])
    assert there.is_mkldnn and blocked(there) is there and dense(x) is x
    assert torch.equal(dense(there), x)


@pytest.mark.onednn
def test_left_dense() -> None:
    x = torch.randn(2, 5, 3, 4)
    assert blocked(x) is x  # gradients may be wanted
    with torch.no_grad():
        for other in (x.double(), x.half(), x[:0], x.to('meta')):
            assert blocked(other) is other
        assert blocked(x, [nn.BatchNorm2d(5)]) is x
        there = blocked(x, [nn.BatchNorm2d(5).eval()])
        assert there.is_mkldnn and not blocked(there, [nn.BatchNorm2d(5)]).is_mkldnn
        with torch.autocast('cpu', torch.bfloat16):
            assert blocked(x) is x
    assert not blocked(there).is_mkldnn


def count_blocked(module: nn.Module, x: Tensor | list[Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many maps ``module`` has brought into blocks, after a comparison with none."""
    brought = []
    with torch.no_grad(), monkeypatch.context() as patch:
        to_mkldnn = Tensor.to_mkldnn
        patch.setattr(Tensor, 'to_mkldnn', lambda map: brought.append(map) or to_mkldnn(map))
        found, _ = tree_flatten(module(x))
        patch.setattr('mmdet.models.layers.conv.AVAILABLE', False)
        number = len(brought)
        expected, _ = tree_flatten(module(x))
    assert len(brought) == number
    for ours, theirs in zip(found, expected, strict=True):
        assert not ours.is_mkldnn
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    return number


@pytest.mark.onednn
@pytest.mark.parametrize('options, chains', [
    (dict(depth=50), 1),
    (dict(depth=18), 1),
    (dict(depth=18, norm_cfg=dict(type='SyncBN')), 1),
    (dict(depth=18, norm_cfg=dict(type='GN', num_groups=8)), 0),
    (dict(depth=18, gcb=GCB, stage_with_gcb=(False, False, (-1,), False)), 2),
    # The stage that follows, and within it each block but the first, which gets what the last stage leaves.
    (dict(depth=50, gcb=GCB, stage_with_gcb=(False, True, False, False)), 1 + 3 + 1),
    (dict(depth=50, gcb=GCB, stage_with_gcb=(False, (1,), False, False)), 1 + 1),
    (dict(depth=50, gcb=GCB | dict(position='after_add'), stage_with_gcb=(False, (1,), False, False)), 2),
    (dict(depth=50, gcb=GCB | dict(position='after_conv2'), stage_with_gcb=(True,) * 4), 0),
    (dict(depth=50, dcn=dict(type='DCN'), stage_with_dcn=(False, True, False, False)), 2),
    (dict(depth=50, dcn=dict(type='DCN'), stage_with_dcn=(False, False, False, True)), 1)])
@pytest.mark.parametrize('fold', [False, True])
def test_backbone(
    options: dict[str, Any], chains: int, fold: bool, trained: Callable[[nn.Module], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = trained(ResNet(**options, zero_init_residual=False)).eval()
    if fold:
        fold_batch_norms(net)
    x = torch.rand(2, 3, 64, 96)
    assert count_blocked(net, x, monkeypatch) == chains
    features = net(x)  # with gradients
    assert all(map.requires_grad and not map.is_mkldnn for map in features)


@pytest.mark.onednn
@pytest.mark.parametrize('options, chains', [
    (dict(gcb=GCB), 1),
    (dict(gcb=GCB | dict(fusion_types=('channel_mul',), pooling_type='avg')), 1),
    (dict(gcb=GCB | dict(position='after_add')), 1 + 3 + 1),
    (dict(gcb=dict(type='SE')), 1 + 3 + 1),
    # Where a dense map comes in, what conv1 makes of it and the identity are brought.
    (dict(gcb=GCB, stage_with_gcb=(True, False, False, False)), 2),
    (dict(gcb=GCB, stage_with_gcb=(True,) * 4), 2),
    (dict(gcb=GCB, stage_with_gcb=(False, False, True, False),
          dcn=dict(type='DCN'), stage_with_dcn=(False, True, False, False)), 1 + 2)])
def test_one_image_stays_in_blocks_behind_a_context_block(
    options: dict[str, Any], chains: int, trained: Callable[[nn.Module], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = dict(stage_with_gcb=(False, True, False, False)) | options
    net = trained(ResNet(50, **options, zero_init_residual=False))
    assert count_blocked(net.eval(), torch.rand(1, 3, 64, 96), monkeypatch) == chains


@pytest.mark.onednn
def test_without_onednn_maps_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert count_blocked(ResNet(18).eval(), torch.rand(1, 3, 64, 96), monkeypatch) == 0


@pytest.mark.onednn
def test_trained_batch_norm_needs_dense_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ResNet(18, norm_eval=False, norm_cfg=dict(type='BN', momentum=0)).train()
    assert count_blocked(net, torch.rand(2, 3, 64, 96), monkeypatch) == 0


PARTS: dict[str, Any] = dict(
    bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_bbox=dict(type='L1Loss'),
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True))


@pytest.mark.onednn
def test_rpn_head(monkeypatch: pytest.MonkeyPatch) -> None:
    head = RPNHead(
        16, 32, dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8]), **PARTS,
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3),
                       sampler=dict(type='RandomSampler', num=8, pos_fraction=0.5)))
    assert count_blocked(head, [torch.randn(2, 16, 8, 12), torch.randn(2, 16, 4, 6)], monkeypatch) == 2


@pytest.mark.onednn
@pytest.mark.parametrize('norm', [None, dict(type='GN', num_groups=4)])
@pytest.mark.parametrize('convs', [0, 2])
def test_roi_heads(convs: int, norm: NormConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rois = torch.randn(3, 16, 7, 7)
    box = ConvFCBBoxHead(16, 7, 5, **PARTS, num_shared_convs=convs, norm_cfg=norm)
    assert count_blocked(box, rois, monkeypatch) == (convs > 0 and norm is None)
    mask = FCNMaskHead(convs, 16, 16, 5, PARTS['loss_cls'], norm)
    assert count_blocked(mask, rois, monkeypatch) == (convs == 0 or norm is None)
    with torch.no_grad():
        assert mask(rois[:0]).shape == (0, 5, 14, 14)
