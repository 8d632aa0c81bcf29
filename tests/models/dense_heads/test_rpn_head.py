from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.task_modules.assigner import BACKGROUND, IGNORED, MaxIoUAssigner

EVERYTHING = 10**6
PROPOSALS = dict(nms_pre=50, max_per_img=60, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
STRIDES = [4, 8]
CODER = BoxCoder((1., 1., 1., 1.))


def make_head(num: int = EVERYTHING, **train_cfg: float) -> RPNHead:
    return RPNHead(
        in_channels=4, feat_channels=24,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0], strides=STRIDES),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type='RandomSampler', num=num, pos_fraction=0.5), **train_cfg))


def make_features(images: int = 2) -> list[Tensor]:
    return [torch.randn(images, 4, 16, 24), torch.randn(images, 4, 8, 12)]


def flat_outputs(head: RPNHead, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits (N, T_i) and deltas (N, T_i, 4) of each level, ordered (y, x, anchor), written out."""
    logits, deltas = [], []
    for x in features:
        hidden = F.conv2d(x, head.rpn_conv.weight, head.rpn_conv.bias, padding=1).relu()
        n, _, h, w = x.shape
        cls = F.conv2d(hidden, head.rpn_cls.weight, head.rpn_cls.bias)
        reg = F.conv2d(hidden, head.rpn_reg.weight, head.rpn_reg.bias)
        logits.append(torch.stack([cls[:, a, i, j] for i in range(h) for j in range(w) for a in range(3)], 1))
        deltas.append(torch.stack(
            [reg[:, 4 * a:4 * a + 4, i, j] for i in range(h) for j in range(w) for a in range(3)], 1))
    return logits, deltas


@pytest.mark.parametrize('border', [None, 0, 4])
def test_losses_written_out(make_sample: Callable, border: int | None) -> None:
    head = (make_head() if border is None else make_head(allowed_border=border)).double()
    features = [level.double().requires_grad_() for level in make_features()]
    samples = [make_sample([[10, 10, 40, 30], [50, 20, 80, 60]]),
               make_sample([[5, 5, 30, 40]], shape=(50, 61))]
    samples[1].pad_shape = (52, 64)
    samples[1].batch_shape = (64, 96)
    logits, deltas = (torch.cat(x, 1) for x in flat_outputs(head, features))
    anchors = torch.cat(head.anchor_generator.grid_anchors(features, torch.float32))
    # The second image has 13 x 16 cells of stride 4 and ceil(52 / 8) x 8 of stride 8.
    cells = [[(i, j) for i in range(h) for j in range(w)] for h, w in [(16, 24), (8, 12)]]
    valid = [torch.tensor([i < h and j < w for level, (h, w) in zip(cells, limits) for i, j in level])
             .repeat_interleave(3) for limits in ([(16, 24), (8, 12)], [(13, 16), (7, 8)])]
    cls_loss = reg_loss = torch.tensor(0.0).double()
    total = 0
    for i, sample in enumerate(samples):
        used = valid[i]
        if border is not None:
            h, w = (side + border for side in sample.img_shape)
            used = used & torch.tensor([x1 >= -border and y1 >= -border and x2 < w and y2 < h
                                        for x1, y1, x2, y2 in anchors.tolist()])
        assigned = torch.full((len(anchors),), -2)
        assigned[used] = MaxIoUAssigner(0.7, 0.3, 0.3).assign(
            anchors[used], sample.boxes, sample.ignored_boxes)
        positive, negative = assigned >= 0, assigned == -1
        cls_loss = cls_loss + F.softplus(-logits[i, positive]).sum() + F.softplus(logits[i, negative]).sum()
        targets = CODER.encode_single(sample.boxes[assigned[positive]], anchors[positive])
        reg_loss = reg_loss + (deltas[i, positive] - targets).abs().sum()
        total += max(int(positive.sum()), 1) + max(int(negative.sum()), 1)
        assert positive.any()
    _, losses = head.loss(features, samples, PROPOSALS)
    torch.testing.assert_close(losses['loss_rpn_cls'], cls_loss / total)
    torch.testing.assert_close(losses['loss_rpn_bbox'], reg_loss / total)
    # The gradients are those of convolutions of whole maps, also of cells at the border.
    inputs = [*features, *head.parameters()]
    found = torch.autograd.grad(sum(losses.values()), inputs)
    for ours, theirs in zip(found, torch.autograd.grad((cls_loss + reg_loss) / total, inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_an_object_at_the_border_keeps_its_best_anchor_inside(make_sample: Callable) -> None:
    # The anchors that overlap it most reach beyond the border; of those inside, some do by 0.42.
    sample = make_sample([[0., 20., 8., 42.]])
    head = make_head(allowed_border=0)
    anchors = torch.cat(head.anchor_generator.grid_anchors(make_features(1), torch.float32))
    overlaps = torchvision.ops.box_iou(anchors, sample.boxes)[:, 0]
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < 96) & (anchors[:, 3] < 64)
    assert overlaps.max() > overlaps[inside].max() + 0.05 and 0.3 < overlaps[inside].max() < 0.7
    assigned = head._assign(anchors, torch.ones(len(anchors), dtype=torch.bool), sample)
    best = inside & (overlaps == overlaps[inside].max())
    assert torch.equal(assigned == 0, best) and (assigned.unique().tolist() == [IGNORED, BACKGROUND, 0])


def test_the_sampler_decides_how_many_anchors_count(make_sample: Callable) -> None:
    head, features = make_head(num=16), make_features(1)
    torch.nn.init.zeros_(head.rpn_cls.weight)
    _, losses = head.loss(features, [make_sample([[10, 10, 40, 30]])], PROPOSALS)
    # Every logit is 0: each of the 16 costs ln 2.
    assert losses['loss_rpn_cls'].item() == pytest.approx(0.6931472)
    # Where there is no positive, one is counted all the same.
    _, losses = head.loss(features, [make_sample([])], PROPOSALS)
    assert losses['loss_rpn_cls'].item() == pytest.approx(0.6931472 * 16 / 17)


@pytest.mark.parametrize('nms_pre, max_per_img, min_size', [
    (50, 60, 0), (10000, 10000, 0), (200, 20, 12), (-1, 60, 0)])
def test_proposals_written_out(make_sample: Callable, nms_pre: int, max_per_img: int, min_size: int) -> None:
    head, features = make_head().double(), [f.double() for f in make_features()]
    torch.nn.init.normal_(head.rpn_cls.weight, std=3)
    torch.nn.init.normal_(head.rpn_reg.weight, std=0.2)
    samples = [make_sample([]), make_sample([], shape=(50, 61))]
    cfg = dict(PROPOSALS, nms_pre=nms_pre, max_per_img=max_per_img, min_bbox_size=min_size)
    logits, deltas = flat_outputs(head, features)
    anchors = head.anchor_generator.grid_anchors(features, torch.float64)
    for i, (sample, found) in enumerate(zip(samples, head.predict(features, samples, cfg), strict=True)):
        boxes, scores = [], []
        for level in range(2):
            order = logits[level][i].argsort(descending=True)[:nms_pre if nms_pre > 0 else None]
            decoded = CODER.decode_single(deltas[level][i, order], anchors[level][order])
            decoded = torchvision.ops.clip_boxes_to_image(decoded, sample.img_shape)
            score = logits[level][i, order]
            large = torchvision.ops.remove_small_boxes(decoded, max(min_size, 1e-9))
            decoded, score = decoded[large], score[large]
            keep = torchvision.ops.nms(decoded, score, 0.7)
            boxes.append(decoded[keep])
            scores.append(score[keep])  # the sigmoid of large logits ties
        all_boxes, all_scores = torch.cat(boxes), torch.cat(scores)
        order = all_scores.argsort(descending=True)[:max_per_img]
        assert len(order) > 15
        torch.testing.assert_close(found.boxes, all_boxes[order], rtol=0, atol=1e-9)
        torch.testing.assert_close(found.scores, all_scores[order].sigmoid(), rtol=0, atol=1e-12)


def test_proposals_of_training_carry_no_gradient(make_sample: Callable) -> None:
    proposals, _ = make_head().loss(make_features(1), [make_sample([[10, 10, 40, 30]])], PROPOSALS)
    assert not proposals[0].boxes.requires_grad and not proposals[0].scores.requires_grad
    assert len(proposals[0].boxes) == 60


@pytest.mark.parametrize('boxes', [([], []), ([], [[10., 10., 40., 30.]])], ids=['all', 'one'])
def test_images_without_objects(make_sample: Callable, boxes: tuple) -> None:
    head = make_head()
    samples = [make_sample(b, crowd=[[0., 0., 50., 50.]]) for b in boxes]
    _, losses = head.loss(make_features(), samples, PROPOSALS)
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses['loss_rpn_bbox'] == 0) == (not any(boxes)) and losses['loss_rpn_cls'] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@torch.no_grad()
def test_what_is_ranked_and_compared_is_float32_in_mixed_precision(make_sample: Callable) -> None:
    head, features = make_head(), make_features(1)
    with torch.autocast('cpu', torch.bfloat16):
        assert head(features)[0][0].dtype == torch.bfloat16
        found, = head.predict(features, [make_sample([])], PROPOSALS)
        logits, deltas = head._forward_at(features, torch.tensor([0]), torch.tensor([5]))
    assert {x.dtype for x in (found.boxes, found.scores, logits, deltas)} == {torch.float32}


def test_initial_weights() -> None:
    head = make_head()
    assert all((layer.bias == 0).all() for layer in (head.rpn_conv, head.rpn_cls, head.rpn_reg))
    assert head.rpn_conv.weight.std().item() == pytest.approx(0.01, rel=0.15)
