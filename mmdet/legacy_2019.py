"""The numerics and recipe of the 2019 code, with which its checkpoints give their published results.

In 2019 a box [x1, y1, x2, y2] included its last pixel: its width was x2 - x1 + 1. With x2 + 1 and
y2 + 1 it is the half-open box that the rest of this package works on, and overlaps, encoding,
decoding, NMS, flips and the choice of a pyramid level are the formulas used anyway. What is left has
its own values and is here: anchors, clipping, the way to the original image, resizing of
annotations, mask targets and pasting. :func:`legacy_2019` puts them into a config.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config, ConfigDict
from torch import Tensor

from mmdet.datasets.masks import resize_masks
from mmdet.models.roi_heads.mask_head import FCNMaskHead
from mmdet.models.task_modules.anchor_generator import AnchorGenerator
from mmdet.models.task_modules.box_coder import DeltaXYWHBBoxCoder
from mmdet.registry import MODELS, TASK_UTILS, TRANSFORMS
from mmdet.structures.boxes import clip_boxes, tensor_like
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import RLE, encode_rle, masks_to_bitmaps

# What a box of 2019 lacks of a half-open one.
LAST_PIXEL = (0.0, 0.0, 1.0, 1.0)


def choose_numerics(cfg: Config, meta: Mapping[str, Any], asked: bool = False) -> Config:
    """The config, with 2019's numerics where a flag, its own key or the checkpoint's mark asks for them."""
    return legacy_2019(cfg) if asked or cfg.get('legacy_2019') or meta.get('legacy_2019') else cfg


def legacy_2019(cfg: Config) -> Config:
    """The config with everything in it that 2019 did otherwise; ``cfg`` itself is left alone."""
    if cfg.get('legacy_2019') and cfg.model.rpn_head.anchor_generator.type == 'AnchorGenerator2019':
        return cfg  # as a training with these numerics leaves it
    cfg = deepcopy(cfg)
    cfg.legacy_2019 = True
    model = cfg.model
    model.rpn_head.anchor_generator.type = 'AnchorGenerator2019'
    model.rpn_head.bbox_coder.type = 'DeltaXYWHBBoxCoder2019'
    model.rpn_head.loss_bbox = dict(type='SmoothL1Loss', beta=1 / 9)
    roi_head = model.roi_head
    for head in roi_head.bbox_head if isinstance(roi_head.bbox_head, list) else [roi_head.bbox_head]:
        head.bbox_coder.type = 'DeltaXYWHBBoxCoder2019'
        head.loss_bbox = dict(type='SmoothL1Loss', beta=1.0)
    for extractor in filter(None, (roi_head.bbox_roi_extractor, roi_head.get('mask_roi_extractor'))):
        extractor.roi_layer.sampling_ratio = 2
        extractor.shift = 0.5
    if roi_head.get('mask_head'):
        roi_head.mask_head.type = 'FCNMaskHead2019'

    train_cfg = model.train_cfg
    # Anchors lie on whole pixels: 2019's x2 < width is x2 <= width here.
    train_cfg.rpn.allowed_border = 0.5
    train_cfg.rpn_proposal.max_per_img = 2000
    for stage in train_cfg.rcnn if isinstance(train_cfg.rcnn, list) else [train_cfg.rcnn]:
        stage.assigner.match_low_quality = True

    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for transform in _transforms(cfg[name].dataset) if cfg.get(name) else []:
            if transform.type in ('Resize', 'RandomChoiceResize'):
                transform.type += '2019'
    if cfg.get('optim_wrapper'):
        cfg.optim_wrapper.clip_grad = dict(max_norm=35, norm_type=2)
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if scheduler.type == 'LinearLR':
            # One more than the iterations of warm-up: mmengine reaches the full rate at end - 1.
            scheduler.update(start_factor=1 / 3, end=501)
    return cfg


def _transforms(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The pipeline of a data set, or those of the data sets that it wraps."""
    yield from dataset.get('pipeline', [])
    for inner in [*dataset.get('datasets', []), *filter(None, [dataset.get('dataset')])]:
        yield from _transforms(inner)


@TASK_UTILS.register_module()
class AnchorGenerator2019(AnchorGenerator):
    """Anchors with corners rounded to whole pixels, around the middle of a cell."""

    def base_anchors(self, stride: int) -> Tensor:
        """The anchors (A, 4) of the cell at the origin, float64, half-open, ratio-major."""
        anchors = super().base_anchors(stride) + stride / 2
        return (anchors - anchors.new_tensor([0.0, 0.0, 1.0, 1.0])).round() + anchors.new_tensor(LAST_PIXEL)


@TASK_UTILS.register_module()
class DeltaXYWHBBoxCoder2019(DeltaXYWHBBoxCoder):
    """Boxes of at least one pixel, whose last pixel is what is scaled and cut off."""

    def clip(self, boxes: Tensor, max_shape: Sequence[int] | Tensor) -> Tensor:
        """Half-open boxes (..., 4) cut off so that both corners' pixels lie in (height, width)."""
        last = tensor_like(LAST_PIXEL, boxes)
        return clip_boxes(boxes - last, tensor_like(max_shape, boxes) - 1) + last

    def to_original(self, boxes: Tensor, scale_factor: Sequence[float] | Tensor) -> Tensor:
        """Half-open boxes (..., 4): the first and the last pixel are divided by the scale."""
        last = tensor_like(LAST_PIXEL, boxes)
        return super().to_original(boxes - last, scale_factor) + last


@MODELS.register_module()
class FCNMaskHead2019(FCNMaskHead):
    """Mask targets and pasted masks resized by OpenCV, on boxes cut to whole pixels."""

    def targets(self, boxes: Tensor, matched: Tensor, sample: DataSample, size: int) -> Tensor:
        """As FCNMaskHead: (P, size, size) bool."""
        if sample.masks is None:
            return super().targets(boxes, matched, sample, size)
        masks = masks_to_bitmaps(sample.masks, sample.img_shape).cpu().numpy()
        targets = np.zeros((len(boxes), size, size), np.uint8)
        for target, (x, y, width, height), index in zip(targets, _whole_pixels(boxes), matched.tolist()):
            cv2.resize(masks[index, y:y + height, x:x + width], (size, size), dst=target)
        return torch.from_numpy(targets).to(boxes.device, torch.bool)

    def paste(self, masks: Tensor, boxes: Tensor, shape: tuple[int, int], threshold: float) -> list[RLE]:
        """As FCNMaskHead, but a probability of ``threshold`` itself is outside."""
        rles: list[RLE] = []
        for mask, (x, y, width, height) in zip(masks.detach().float().cpu().numpy(), _whole_pixels(boxes)):
            image = np.zeros(shape, np.uint8)
            inside = cv2.resize(mask, (width, height)) > threshold
            region = image[y:y + height, x:x + width]
            region[:] = inside[:region.shape[0], :region.shape[1]]
            rles += encode_rle(torch.from_numpy(image)[None])
        return rles


def _whole_pixels(boxes: Tensor) -> list[tuple[int, int, int, int]]:
    """(x, y, width, height) of half-open boxes (n, 4) with 2019's corners cut down to integers."""
    corners = (boxes.detach() - boxes.new_tensor(LAST_PIXEL)).cpu().numpy().astype(np.int32).tolist()
    return [(x1, y1, max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)) for x1, y1, x2, y2 in corners]


@TRANSFORMS.register_module()
class Resize2019(BaseTransform):
    """Resize by one factor, which is also what boxes are multiplied with (the image's size is rounded).

    Boxes come in continuous and leave half-open: their first and last pixels are scaled.

    Args:
        scale: (width, height): the longer side fits the larger, the shorter side the smaller.
        keep_ratio: always true; an argument so that ``Resize`` of a config can be replaced.
    """

    def __init__(self, scale: tuple[int, int], keep_ratio: bool = True) -> None:
        if not keep_ratio:
            raise ValueError('the 2019 numerics know no Resize with keep_ratio=False')
        self.scale = scale

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Changes ``img``, ``img_shape``, boxes and masks; adds ``scale_factor``."""
        height, width = results['img_shape']
        (new_width, new_height), factor = mmcv.rescale_size(
            (width, height), tuple(self.scale), return_scale=True)
        new_width, new_height = max(new_width, 1), max(new_height, 1)  # of a sliver
        results['img'] = mmcv.imresize(results['img'], (new_width, new_height))
        results['img_shape'] = (new_height, new_width)
        results['scale_factor'] = (factor, factor)
        last = np.array(LAST_PIXEL, np.float32)
        limit = np.array([new_width, new_height, new_width, new_height], np.float32) - 1
        for key in results.keys() & {'boxes', 'ignored_boxes'}:
            pixels = (results[key] - last) * np.float32(factor)
            results[key] = pixels.clip(0, limit) + last
        if 'masks' in results:
            results['masks'] = resize_masks(results['masks'], results['img_shape'])
        return results


@TRANSFORMS.register_module()
class RandomChoiceResize2019(BaseTransform):
    """Resize2019 with one of several scales, drawn with equal probability (multi-scale training)."""

    def __init__(self, scales: Sequence[tuple[int, int]], keep_ratio: bool = True) -> None:
        self.resizes = [Resize2019(scale, keep_ratio) for scale in scales]

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """As Resize2019."""
        return self.resizes[results['rng'].integers(len(self.resizes))].transform(results)
