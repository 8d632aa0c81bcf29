"""The cascade in the 2019 mode against the 2019 formulas written out on inclusive corners, in float64."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from mmdet.legacy_2019 import LAST_PIXEL, legacy_2019
from mmdet.registry import MODELS
from mmdet.structures.boxes import Proposals
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import crop_masks
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[3]
SHAPE, SCALE, ORIGINAL = (96, 128), 1.6, (60, 80)
STRIDES = (4, 8, 16, 32)
LIMIT = 4.135166556742356  # of log ratios
STDS = ([.1, .1, .2, .2], [.05, .05, .1, .1], [.033, .033, .067, .067])
CONFIG = ROOT / 'configs' / 'gcnet' / 'cascade_mask_rcnn_r4_gcb_dconv_c3-c5_x101_32x4d_fpn_syncbn_1x.py'
OBJECTS = torch.tensor([[8., 8., 47., 39.], [50., 20., 110., 80.]], dtype=torch.float64)  # inclusive
CLASSES = [3, 1]


@pytest.fixture
def head() -> Any:
    parts = {'bbox_roi_extractor.out_channels': 8, 'mask_roi_extractor.out_channels': 8,
             'mask_head.in_channels': 8, 'mask_head.conv_out_channels': 8, 'mask_head.num_classes': 5}
    for i in range(3):
        parts |= {f'bbox_head.{i}.{key}': value for key, value in (
            ('in_channels', 8), ('fc_out_channels', 16), ('num_classes', 5))}
    cfg = legacy_2019(load_config(CONFIG, {f'model.roi_head.{key}': value for key, value in parts.items()}))
    model = cfg.model
    del model.train_cfg.rcnn[0]['mask_size']  # 28 by default
    head = MODELS.build(dict(model.roi_head, train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn))
    for name, parameter in head.named_parameters():
        if 'fc_cls' in name or 'fc_reg' in name:
            nn.init.normal_(parameter, std=0.5)
    return head.double()


@pytest.fixture
def features() -> list[Tensor]:
    return [torch.randn(1, 8, SHAPE[0] // s, SHAPE[1] // s, dtype=torch.float64) for s in STRIDES]


@pytest.fixture
def proposals() -> Tensor:
    """Inclusive boxes: around the objects, near enough for each stage's threshold or not, and elsewhere."""
    near = OBJECTS.repeat(12, 1) + torch.randn(24, 4, dtype=torch.float64) * 4
    corner = torch.rand(16, 2, dtype=torch.float64) * 60
    boxes = torch.cat([near, torch.cat([corner, corner + 10 + 25 * torch.rand(16, 2)], dim=1)])
    return torch.minimum(boxes.clamp(min=0), torch.tensor([127., 95., 127., 95.]))


def sample(masks: Tensor | None = None) -> DataSample:
    last = OBJECTS.new_tensor(LAST_PIXEL)
    return DataSample(1, 'image', ORIGINAL, SHAPE, (SCALE, SCALE), boxes=OBJECTS + last,
                      labels=torch.tensor(CLASSES), masks=None if masks is None else crop_masks(masks))


def pooled(features: list[Tensor], boxes: Tensor, size: int) -> Tensor:
    """RoIAlign of 2019: corners times the scale, the last pixel included, 2 x 2 samples a bin."""
    out = []
    for x1, y1, x2, y2 in boxes.tolist():
        side = ((x2 - x1 + 1) * (y2 - y1 + 1)) ** 0.5
        level = min(max(int(np.floor(np.log2(side / 56 + 1e-6))), 0), 3)
        feature, scale = features[level][0], 1 / STRIDES[level]
        axes = []
        for start, end, length in ((y1, y2, feature.shape[1]), (x1, x2, feature.shape[2])):
            steps = (torch.arange(2 * size, dtype=torch.float64) + 0.5) / 2
            at = start * scale + steps * (end + 1 - start) * scale / size
            inside = (at >= -1) & (at <= length)
            at = at.clamp(0, length - 1)
            low = at.floor().long().clamp(max=max(length - 2, 0))
            weight = torch.zeros(2 * size, length, dtype=torch.float64)
            weight[torch.arange(2 * size), low] += 1 - (at - low)
            weight[torch.arange(2 * size), (low + 1).clamp(max=length - 1)] += at - low
            axes.append(weight * inside[:, None])
        out.append(F.avg_pool2d(torch.einsum('ih,chw,jw->cij', axes[0], feature, axes[1]), 2))
    return torch.stack(out)


def decoded(boxes: Tensor, deltas: Tensor, stds: list[float]) -> Tensor:
    """delta2bbox of 2019, for deltas (K, 4) that serve all classes."""
    dx, dy, dw, dh = (deltas * deltas.new_tensor(stds)).T
    width, height = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    new_width, new_height = width * dw.clamp(-LIMIT, LIMIT).exp(), height * dh.clamp(-LIMIT, LIMIT).exp()
    x = (boxes[:, 0] + boxes[:, 2]) / 2 + width * dx
    y = (boxes[:, 1] + boxes[:, 3]) / 2 + height * dy
    return torch.stack([
        (x - new_width / 2 + 0.5).clamp(0, SHAPE[1] - 1), (y - new_height / 2 + 0.5).clamp(0, SHAPE[0] - 1),
        (x + new_width / 2 - 0.5).clamp(0, SHAPE[1] - 1), (y + new_height / 2 - 0.5).clamp(0, SHAPE[0] - 1),
    ], dim=1)


def iou(a: list[float], b: list[float]) -> float:
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1, 0) for i in (0, 1))
    area = sum((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b))
    return width * height / (area - width * height)


def whole_pixels(box: Tensor) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(value) for value in box.tolist())
    return x1, y1, max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)


def test_detections(head: Any, features: list[Tensor], proposals: Tensor) -> None:
    head.eval().requires_grad_(False)
    last = proposals.new_tensor(LAST_PIXEL)
    [found] = head.predict(features, [Proposals(proposals + last, torch.rand(40))], [sample()])

    boxes, all_logits = proposals, []
    for stage, stds in zip(head.bbox_head, STDS):
        logits, deltas = stage(pooled(features, boxes, 7))
        all_logits.append(logits)
        boxes = decoded(boxes, deltas, stds)
    scores = (sum(all_logits) / 3).softmax(dim=1)
    expected = []
    for label in range(5):
        kept: list[int] = []
        for i in scores[:, label].argsort(descending=True).tolist():
            original = (boxes / SCALE).tolist()
            if scores[i, label] > 0.05 and all(iou(original[i], original[j]) <= 0.5 for j in kept):
                kept.append(i)
        expected += [(scores[i, label].item(), label, boxes[i]) for i in kept]
    expected = sorted(expected, key=lambda row: -row[0])[:100]

    assert len(expected) > 10 and len({label for _, label, _ in expected}) > 2
    assert found['labels'].tolist() == [label for _, label, _ in expected]
    torch.testing.assert_close(found['scores'], torch.tensor([s for s, _, _ in expected]).double())
    rois = torch.stack([box for _, _, box in expected])
    torch.testing.assert_close(found['boxes'], rois / SCALE + last)
    rows = torch.arange(len(rois))
    masks = sum(m(pooled(features, rois, 14))[rows, found['labels']].sigmoid() for m in head.mask_head) / 3
    for rle, mask, box in zip(found['masks'], masks.numpy().astype(np.float32), rois / SCALE):
        x, y, width, height = whole_pixels(box)
        image = np.zeros(ORIGINAL, np.uint8)
        region = image[y:y + height, x:x + width]
        region[:] = (cv2.resize(mask, (width, height)) > 0.5)[:region.shape[0], :region.shape[1]]
        assert np.abs(coco_mask.decode(rle).astype(int) - image).sum() <= 1


def test_losses(head: Any, features: list[Tensor], proposals: Tensor) -> None:
    masks = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    masks[0, 8:30, 8:48] = masks[1, 40:81, 50:90] = 1
    last = proposals.new_tensor(LAST_PIXEL)
    found = head.loss(features, [Proposals(proposals + last, torch.rand(40))], [sample(masks)])

    boxes, expected, positives = proposals, {}, []
    for i, (stds, threshold, weight) in enumerate(zip(STDS, (0.5, 0.6, 0.7), (1, 0.5, 0.25))):
        overlaps = torch.tensor([[iou(box, gt) for gt in OBJECTS.tolist()] for box in boxes.tolist()])
        best, matched = overlaps.max(dim=1)
        matched = torch.cat([torch.arange(2), torch.where(best >= threshold, matched, -1)])
        boxes = torch.cat([OBJECTS, boxes])
        order = torch.cat([(matched >= 0).nonzero()[:, 0], (matched < 0).nonzero()[:, 0]])
        boxes, matched = boxes[order], matched[order]
        num = int((matched >= 0).sum())
        positives.append(num)
        labels = torch.tensor([CLASSES[m] if m >= 0 else 5 for m in matched])
        logits, deltas = head.bbox_head[i](pooled(features, boxes, 7))
        gt, box = OBJECTS[matched[:num]], boxes[:num]
        size, gt_size = box[:, 2:] - box[:, :2] + 1, gt[:, 2:] - gt[:, :2] + 1
        centres = (gt[:, :2] + gt[:, 2:] - box[:, :2] - box[:, 2:]) / 2
        targets = torch.cat([centres / size, (gt_size / size).log()], dim=1) / box.new_tensor(stds)
        mask_logits = head.mask_head[i](pooled(features, box, 14))[torch.arange(num), labels[:num]]
        mask_targets = []
        for j, box_j in enumerate(box):
            x, y, width, height = whole_pixels(box_j)
            crop = masks[matched[j], y:y + height, x:x + width].numpy()
            mask_targets.append(torch.from_numpy(cv2.resize(crop, (28, 28))).double())
        expected |= {
            f's{i}.loss_cls': weight * F.cross_entropy(logits, labels),
            f's{i}.loss_bbox':
                weight * F.smooth_l1_loss(deltas[:num], targets, reduction='sum') / len(boxes),
            f's{i}.loss_mask':
                weight * F.binary_cross_entropy_with_logits(mask_logits, torch.stack(mask_targets)),
            f's{i}.acc': (logits.argmax(dim=1) == labels).double().mean() * 100}
        refined = decoded(boxes, deltas.detach(), stds)
        boxes = refined[[j for j in range(len(boxes)) if order[j] >= 2]]

    assert found.keys() == expected.keys()
    # Each stage has other positives, and more than the objects themselves.
    assert len(set(positives)) == 3 and min(positives) > 2
    for name, value in expected.items():
        # Box targets are float32 in a model of any dtype.
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6, atol=1e-9, msg=name)


def test_images_without_proposals_have_no_detections(head: Any, features: list[Tensor]) -> None:
    empty = Proposals(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0))
    [found] = head.eval().requires_grad_(False).predict(features, [empty], [sample()])
    assert found['boxes'].shape == (0, 4) and found['masks'] == [] and len(found['scores']) == 0
