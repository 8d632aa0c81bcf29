"""What stays in oneDNN's layout, and that it has the values of PyTorch's."""
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmdet.models.backbones.resnet import ResNet
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.layers.blocked import blocked, dense
from mmdet.models.layers.norm import NormConfig, fold_batch_norms
from mmdet.models.roi_heads.bbox_head import ConvFCBBoxHead
from mmdet.models.roi_heads.mask_head import FCNMaskHead

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this PyTorch has no oneDNN')


@torch.no_grad()
def test_there_and_back() -> None:
    x = torch.randn(2, 5, 3, 4)
    there = blocked(x, [None, nn.Identity()])
    assert there.is_mkldnn and blocked(there) is there and dense(x) is x
    assert torch.equal(dense(there), x)


def test_left_dense() -> None:
    x = torch.randn(2, 5, 3, 4)
    assert blocked(x) is x  # gradients may be wanted
    with torch.no_grad():
        for other in (x.double(), x.half(), x[:0], x.to('meta')):
            assert blocked(other) is other
        assert blocked(x, [nn.BatchNorm2d(5)]) is x
        assert not blocked(blocked(x), [nn.BatchNorm2d(5)]).is_mkldnn
        with torch.autocast('cpu', torch.bfloat16):
            assert blocked(x) is x


def count_blocked(module: nn.Module, x: Tensor | list[Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many maps ``module`` has brought into blocks, after a comparison with none."""
    brought = []
    with torch.no_grad(), monkeypatch.context() as patch:
        to_mkldnn = Tensor.to_mkldnn
        patch.setattr(Tensor, 'to_mkldnn', lambda map: brought.append(map) or to_mkldnn(map))
        found, _ = tree_flatten(module(x))
        patch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
        number = len(brought)
        expected, _ = tree_flatten(module(x))
    assert len(brought) == number
    for ours, theirs in zip(found, expected, strict=True):
        assert not ours.is_mkldnn
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    return number


@pytest.mark.parametrize('depth, context, deformable, chains', [
    (50, False, False, 1),
    (18, False, False, 1),
    (50, True, False, 2),  # up to the one block with context, and from there on
    (50, False, True, 1),  # the last stage comes after the chain
    (50, True, True, 2)])
def test_backbone(
    depth: int, context: bool, deformable: bool, chains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = ResNet(
        depth, gcb=dict(ratio=1 / 4), stage_with_gcb=(False, (-1,) if context else False, False, False),
        dcn=dict(type='DCN') if deformable else None, stage_with_dcn=(False, False, False, deformable),
        zero_init_residual=False).eval()
    x = torch.rand(2, 3, 64, 96)
    assert count_blocked(net, x, monkeypatch) == 0  # batch norm is not oneDNN's
    fold_batch_norms(net)
    assert count_blocked(net, x, monkeypatch) == chains


PARTS: dict[str, Any] = dict(
    bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_bbox=dict(type='L1Loss'),
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True))


def test_rpn_head(monkeypatch: pytest.MonkeyPatch) -> None:
    head = RPNHead(
        16, 32, dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8]), **PARTS,
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3),
                       sampler=dict(type='RandomSampler', num=8, pos_fraction=0.5)))
    assert count_blocked(head, [torch.randn(2, 16, 8, 12), torch.randn(2, 16, 4, 6)], monkeypatch) == 2


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
