"""Transforms from an image file and its annotations to the input of the data preprocessor.

Keys that they pass on in ``results``, beside those of CocoDataset: ``img`` (H, W, 3) uint8 BGR;
``ori_shape`` and ``img_shape`` (height, width) of the file and of ``img``; ``boxes`` (G, 4) and
``ignored_boxes`` (I, 4) float32 xyxy in pixels of ``img``; ``labels`` (G,) int64; ``masks``, a MaskView
that becomes MaskCrops at the end; ``scale_factor`` (w, h); ``flip``.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform

from mmdet.datasets.masks import flip_masks, rasterise_masks, resize_masks, view_masks
from mmdet.registry import TRANSFORMS
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import RLE, segmentation_to_rle

Results = dict[str, Any]


@TRANSFORMS.register_module()
class LoadImageFromFile(BaseTransform):
    """Reads the image file ``img_path``, turned upright as its EXIF orientation says.

    Grey, palette, CMYK, transparent and 16-bit images become 8-bit BGR. OpenCV >= 4.11 refuses
    truncated files; earlier versions fill the rest of a JPEG with grey.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded, or its size is not the ``width`` and ``height`` of the
            annotation file, so that the annotations would be misplaced.
    """

    def transform(self, results: Results) -> Results:
        """Adds ``img``, ``ori_shape``, ``img_shape``."""
        path = results['img_path']
        content = np.fromfile(path, np.uint8)
        try:
            img = cv2.imdecode(content, cv2.IMREAD_COLOR)
        except cv2.error:  # an empty file, for example
            img = None
        if img is None:
            raise ValueError(f'{path} cannot be decoded: it is truncated, damaged or no image')
        height, width = img.shape[:2]
        expected = (results.get('height', height), results.get('width', width))
        if (height, width) != expected:
            raise ValueError(
                f'{path} is {width} x {height} pixels (width x height, after its EXIF rotation if any), '
                f'but the annotation file says {expected[1]} x {expected[0]}')
        results['img'] = img
        results['ori_shape'] = results['img_shape'] = (height, width)
        return results


@TRANSFORMS.register_module()
class LoadAnnotations(BaseTransform):
    """Turns ``instances`` into arrays; crowds go to ``ignored_boxes`` and have neither label nor mask.

    Args:
        with_mask: take the segmentations too. An object whose polygons all have fewer than 3
            points is then ignored, as in mmdetection.
    """

    def __init__(self, with_mask: bool = False) -> None:
        self.with_mask = with_mask

    def transform(self, results: Results) -> Results:
        """Adds ``boxes``, ``labels``, ``ignored_boxes`` and, on demand, ``masks``."""
        objects, ignored, rles = [], [], []
        for instance in results['instances']:
            if instance['ignore_flag']:
                ignored.append(instance)
                continue
            if self.with_mask:
                rle = _to_rle(instance.get('mask'), results)
                if rle is None:
                    ignored.append(instance)
                    continue
                rles.append(rle)
            objects.append(instance)
        results['boxes'] = np.array([o['bbox'] for o in objects], np.float32).reshape(-1, 4)
        results['labels'] = np.array([o['bbox_label'] for o in objects], np.int64)
        results['ignored_boxes'] = np.array([i['bbox'] for i in ignored], np.float32).reshape(-1, 4)
        if self.with_mask:
            results['masks'] = view_masks(rles, results['ori_shape'])
        return results


def _to_rle(segmentation: list | RLE | None, results: Results) -> RLE | None:
    """The segmentation as RLE; None if no polygon of it has 3 points."""
    height, width = results['ori_shape']
    if isinstance(segmentation, list):
        segmentation = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
        if not segmentation:
            return None
    if not segmentation:
        raise ValueError(f'an object of {results["img_path"]} has no segmentation')
    return segmentation_to_rle(segmentation, height, width)


@TRANSFORMS.register_module()
class Resize(BaseTransform):
    """Resizes image (bilinear), boxes and masks (nearest); boxes are then clipped to the image.

    Args:
        scale: (width, height) in pixels.
        keep_ratio: make the image as large as fits: its longer side into the larger of ``scale``,
            its shorter side into the smaller.
    """

    def __init__(self, scale: Sequence[int], keep_ratio: bool = False) -> None:
        self.scale = _checked_scale(scale)
        self.keep_ratio = keep_ratio

    def transform(self, results: Results) -> Results:
        """Changes ``img``, ``img_shape``, boxes and masks; adds ``scale_factor``."""
        return _resize(results, self.scale, self.keep_ratio)


@TRANSFORMS.register_module()
class RandomChoiceResize(BaseTransform):
    """Resize with one of several scales, drawn with equal probability (multi-scale training)."""

    def __init__(self, scales: Sequence[Sequence[int]], keep_ratio: bool = True) -> None:
        if not scales:
            raise ValueError('RandomChoiceResize needs at least one scale')
        self.scales = [_checked_scale(scale) for scale in scales]
        self.keep_ratio = keep_ratio

    def transform(self, results: Results) -> Results:
        """As Resize."""
        return _resize(results, self.scales[results['rng'].integers(len(self.scales))], self.keep_ratio)


def _checked_scale(scale: Sequence[int]) -> tuple[int, int]:
    is_pair = isinstance(scale, Sequence) and len(scale) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in scale):
        raise ValueError(f'a scale is (width, height), two positive integers, not {scale!r}')
    return scale[0], scale[1]


def _resize(results: Results, scale: tuple[int, int], keep_ratio: bool) -> Results:
    height, width = results['img_shape']
    new_width, new_height = mmcv.rescale_size((width, height), scale) if keep_ratio else scale
    new_width, new_height = max(new_width, 1), max(new_height, 1)  # of a sliver
    results['img'] = mmcv.imresize(results['img'], (new_width, new_height))
    results['img_shape'] = (new_height, new_width)
    # Ratios of the rounded sizes: the scale itself would misplace boxes by up to half a pixel.
    factor = (new_width / width, new_height / height)
    old = results.get('scale_factor', (1.0, 1.0))
    results['scale_factor'] = (old[0] * factor[0], old[1] * factor[1])
    for key in ('boxes', 'ignored_boxes'):
        if key in results:
            boxes = results[key] * np.array([*factor, *factor], np.float32)
            limit = np.array([new_width, new_height, new_width, new_height], np.float32)
            results[key] = boxes.clip(0, limit)
    if 'masks' in results:
        results['masks'] = resize_masks(results['masks'], (new_height, new_width))
    return results


@TRANSFORMS.register_module()
class RandomFlip(BaseTransform):
    """Mirrors image, boxes and masks left to right with probability ``prob``."""

    def __init__(self, prob: float = 0.5) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f'RandomFlip: prob must lie in [0, 1], not {prob}')
        self.prob = prob

    def transform(self, results: Results) -> Results:
        """Changes ``img``, boxes and masks; adds ``flip``."""
        results['flip'] = bool(results['rng'].random() < self.prob)
        if not results['flip']:
            return results
        width = results['img_shape'][1]
        results['img'] = cv2.flip(results['img'], 1)
        for key in ('boxes', 'ignored_boxes'):
            if key in results:
                x1, y1, x2, y2 = results[key].T
                results[key] = np.stack([width - x2, y1, width - x1, y2], axis=1)
        if 'masks' in results:
            results['masks'] = flip_masks(results['masks'])
        return results


@TRANSFORMS.register_module()
class PackDetInputs(BaseTransform):
    """Ends a pipeline: ``dict(inputs=uint8 Tensor (3, H, W) BGR, data_samples=DataSample)``."""

    def transform(self, results: Results) -> dict[str, torch.Tensor | DataSample]:
        """Results to model input; keys that the pipeline has not set keep DataSample's defaults."""
        meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip')
        arrays = ('boxes', 'labels', 'ignored_boxes')
        values: Results = {key: results[key] for key in meta if key in results}
        values.update({key: torch.from_numpy(results[key]) for key in arrays if key in results})
        if 'masks' in results:
            values['masks'] = rasterise_masks(results['masks'])
        inputs = torch.from_numpy(results['img']).permute(2, 0, 1).contiguous()
        return dict(inputs=inputs, data_samples=DataSample(**values))
