from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from mmdet.models.roi_heads.bbox_head import ConvFCBBoxHead
from mmdet.models.roi_heads.stage import SampledRoIs
from mmdet.structures.boxes import boxes_to_rois
from mmdet.structures.data_sample import DataSample

CODER = BoxCoder((10., 10., 5., 5.))
CFG = dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
SAMPLE = DataSample(img_id=1, img_path='', ori_shape=(64, 80), img_shape=(64, 80))


def make_head(**options: object) -> ConvFCBBoxHead:
    return ConvFCBBoxHead(**dict(
        in_channels=4, roi_feat_size=3, num_classes=5, fc_out_channels=16,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='CrossEntropyLoss'), loss_bbox=dict(type='L1Loss')) | options)


def random_boxes(number: int) -> Tensor:
    corner = torch.rand(number, 2) * 60
    return torch.cat([corner, corner + torch.rand(number, 2) * 30 + 4], dim=1)


def test_forward_written_out() -> None:
    head, x = make_head(), torch.randn(6, 4, 3, 3)
    hidden = x.flatten(1)
    for fc in head.shared_fcs:
        hidden = F.linear(hidden, fc.weight, fc.bias).relu()
    logits, deltas = head(x)
    torch.testing.assert_close(logits, F.linear(hidden, head.fc_cls.weight, head.fc_cls.bias))
    torch.testing.assert_close(deltas, F.linear(hidden, head.fc_reg.weight, head.fc_reg.bias))
    assert logits.shape == (6, 6) and deltas.shape == (6, 20)


def test_four_convolutions_and_one_layer() -> None:
    head = make_head(num_shared_convs=4, num_shared_fcs=1, conv_out_channels=8, norm_cfg=dict(type='BN'),
                     reg_class_agnostic=True)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes['shared_convs.0.conv.weight'] == (8, 4, 3, 3) and shapes['shared_convs.3.bn.bias'] == (8,)
    assert shapes['shared_fcs.0.weight'] == (16, 8 * 9) and 'shared_fcs.1.weight' not in shapes
    assert 'shared_convs.0.conv.bias' not in shapes
    assert [tuple(out.shape) for out in head(torch.randn(6, 4, 3, 3))] == [(6, 6), (6, 4)]


@pytest.mark.parametrize('agnostic', [False, True])
def test_losses_written_out(make_sample: Callable, agnostic: bool) -> None:
    head = make_head(reg_class_agnostic=agnostic)
    boxes, labels = random_boxes(8), torch.tensor([2, 0, 4, 5, 5, 2, 5, 5])
    gt_boxes = boxes[labels < 5] + torch.randn(4, 4)
    logits, deltas = torch.randn(8, 6), torch.randn(8, 4 if agnostic else 20)
    # Two images, the objects of the first in another order than its RoIs.
    samples = [make_sample(gt_boxes[:3].flip(0).tolist()), make_sample(gt_boxes[3:].tolist())]
    sampled = [SampledRoIs(boxes[:5], labels[:5], torch.tensor([2, 1, 0]), labels[:5] == 9),
               SampledRoIs(boxes[5:], labels[5:], torch.tensor([0]), labels[5:] == 9)]
    losses = head.loss(logits, deltas, sampled, samples)
    regression, gt = 0.0, iter(gt_boxes)
    for i, label in enumerate(labels.tolist()):
        if label < 5:
            start = 0 if agnostic else 4 * label
            target = CODER.encode_single(next(gt)[None], boxes[i:i + 1])
            regression += (deltas[i, start:start + 4] - target).abs().sum().item()
    assert losses['loss_bbox'].item() == pytest.approx(regression / 8, rel=1e-5)
    torch.testing.assert_close(losses['loss_cls'], F.cross_entropy(logits, labels))
    assert losses['acc'].item() == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_losses_of_nothing_and_of_background_alone(make_sample: Callable) -> None:
    head = make_head()
    for number in (0, 3):
        logits, deltas = head(torch.randn(number, 4, 3, 3))
        background = torch.full((number,), 5)
        sampled = SampledRoIs(random_boxes(number), background, background[:0], background == 9)
        losses = head.loss(logits, deltas, [sampled], [make_sample([])])
        assert losses['loss_bbox'] == 0 and losses['loss_cls'].isfinite() and losses['acc'].isfinite()
        head.zero_grad()
        (losses['loss_bbox'] + losses['loss_cls']).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize('agnostic', [False, True])
@pytest.mark.parametrize('limit', [100, 7])
def test_detections_written_out(agnostic: bool, limit: int) -> None:
    head = make_head(reg_class_agnostic=agnostic)
    boxes = random_boxes(40)
    scores, deltas = (torch.randn(40, 6) * 2).softmax(1), torch.randn(40, 4 if agnostic else 20) * 0.3
    expected = []
    for label in range(5):
        own = deltas if agnostic else deltas[:, 4 * label:4 * label + 4]
        decoded = torchvision.ops.clip_boxes_to_image(CODER.decode_single(own, boxes), (64, 80))
        chosen = scores[:, label] > 0.05
        decoded, score = decoded[chosen], scores[chosen, label]
        expected += [(score[k].item(), label, decoded[k]) for k in torchvision.ops.nms(decoded, score, 0.5)]
    expected = sorted(expected, key=lambda row: -row[0])[:limit]
    cfg, rois = dict(CFG, max_per_img=limit), boxes_to_rois([boxes])
    [(_, found, found_scores, labels)] = head.predict(scores, deltas, rois, [SAMPLE], cfg)
    assert labels.tolist() == [label for _, label, _ in expected]
    assert len(expected) > 5
    torch.testing.assert_close(found_scores, torch.tensor([score for score, _, _ in expected]))
    torch.testing.assert_close(found, torch.stack([box for _, _, box in expected]), rtol=0, atol=1e-4)


def test_images_do_not_meet() -> None:
    """Each image's detections are those it has alone, in its own size and scale."""
    head = make_head()
    other = DataSample(img_id=2, img_path='', ori_shape=(25, 30), img_shape=(50, 60), scale_factor=(2.0, 2.0))
    samples, boxes = [SAMPLE, other, SAMPLE], [random_boxes(40), random_boxes(30), random_boxes(0)]
    boxes[1][:20] = boxes[0][:20]
    scores, deltas = (torch.randn(70, 6) * 2).softmax(1), torch.randn(70, 20) * 0.3
    found = head.predict(scores, deltas, boxes_to_rois(boxes), samples, CFG)
    for i, rows in enumerate((slice(0, 40), slice(40, 70), slice(70, 70))):
        [alone] = head.predict(scores[rows], deltas[rows], boxes_to_rois([boxes[i]]), [samples[i]], CFG)
        assert all(torch.equal(a, b) for a, b in zip(found[i], alone, strict=True))
    assert len(found[0].scores) > 5 and len(found[1].scores) > 5


def test_background_is_no_detection() -> None:
    scores = torch.tensor([[0.01] * 5 + [0.95]])
    for count in (1, 0):
        rois = boxes_to_rois([random_boxes(count)])
        [found] = make_head().predict(scores[:count], torch.zeros(count, 20), rois, [SAMPLE], CFG)
        assert [tuple(x.shape) for x in found] == [(0, 4), (0, 4), (0,), (0,)]


def test_initial_weights() -> None:
    head = make_head(fc_out_channels=512)
    assert head.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.fc_reg.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert head.shared_fcs[1].weight.abs().max().item() == pytest.approx((6 / 1024) ** 0.5, rel=0.01)
    assert all((p == 0).all() for name, p in head.named_parameters() if name.endswith('bias'))
