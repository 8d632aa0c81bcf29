"""Free functions on instance masks: rasterise, crop to RoIs, paste into images, COCO RLE."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from mmdet import ops

RLE = dict[str, Any]
"""COCO run-length encoding: {'size': [height, width], 'counts': bytes}."""


class MaskCrops(NamedTuple):
    """Masks of the G objects of an image, each cut out where the object is."""

    pixels: Tensor
    """(B,) uint8, 0 or 1, of all crops one after another, row by row."""
    crops: Tensor
    """(G, 5) int64, rows [first pixel, x1, y1, x2, y2]: which pixels of the image a crop shows."""


def crop_masks(bitmaps: Tensor) -> MaskCrops:
    """Bitmaps (G, H, W) uint8 as crops, each of the whole image."""
    count, height, width = bitmaps.shape
    crops = torch.tensor([0, 0, 0, width, height], device=bitmaps.device).repeat(count, 1)
    crops[:, 0] = torch.arange(count, device=bitmaps.device) * (height * width)
    return MaskCrops(bitmaps.flatten(), crops)


def masks_to_bitmaps(masks: MaskCrops, shape: tuple[int, int]) -> Tensor:
    """Bitmaps (G, H, W) uint8 of an image of ``shape`` (height, width)."""
    bitmaps = masks.pixels.new_zeros(len(masks.crops), *shape)
    for bitmap, (first, x1, y1, x2, y2) in zip(bitmaps, masks.crops.tolist()):
        bitmap[y1:y2, x1:x2] = masks.pixels[first:first + (y2 - y1) * (x2 - x1)].view(y2 - y1, x2 - x1)
    return bitmaps


def finished(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction dict with its masks, after waiting for them if they are still being encoded."""
    masks = prediction.get('masks')
    return dict(prediction, masks=masks.result()) if isinstance(masks, Future) else dict(prediction)


def segmentation_to_rle(segmentation: list[list[float]] | RLE, height: int, width: int) -> RLE:
    """COCO annotation (polygons, uncompressed or compressed RLE) to compressed RLE."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation['counts'], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def encode_rle(masks: Tensor) -> list[RLE]:
    """Binary masks (N, H, W) to COCO RLE."""
    columns_first = masks.to(device='cpu', dtype=torch.uint8).permute(1, 2, 0).numpy()
    return coco_mask.encode(np.asfortranarray(columns_first))


def paste_masks(masks: Tensor, boxes: Tensor, shape: tuple[int, int], threshold: float) -> list[RLE]:
    """Probabilities (N, M, M) inside boxes (N, 4) to binary masks of an image, as COCO RLE.

    A pixel belongs to the mask where the bilinearly sampled probability is >= ``threshold``
    (Mask R-CNN, arXiv 1703.06870, section 3.1). ``shape`` is (height, width). See
    ``mmdet.ops.paste_masks``.
    """
    height, width = shape
    texts, lengths = ops.paste_masks(masks, boxes, height, width, threshold)
    content, end = texts.numpy().tobytes(), lengths.cumsum(0).tolist()
    return [dict(size=[height, width], counts=content[a:b]) for a, b in zip([0, *end], end)]
