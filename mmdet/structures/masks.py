"""Free functions on instance masks: rasterise, crop to RoIs, paste into images, COCO RLE."""

import math
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
FARTHEST = 100_000  # pixels; an outline takes memory for each of its pixels
_UNKNOWN = 'neither a list of polygons [x1, y1, x2, y2, ...] nor an RLE'


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


def segmentation_problem(segmentation: Any, height: int, width: int) -> str:
    """Why pycocotools would fail, or never end, on a COCO segmentation of an image; '' if it would not."""
    if not segmentation:
        return 'has no segmentation'
    if isinstance(segmentation, list):
        try:
            near = all(math.isfinite(sum(polygon)) and max(polygon, default=0) <= FARTHEST
                       and min(polygon, default=0) >= -FARTHEST for polygon in segmentation)
        except TypeError:
            return f'has a segmentation that is {_UNKNOWN}: {str(segmentation)[:100]}'
        return '' if near else f'has a polygon with a coordinate that is NaN or beyond {FARTHEST} pixels'
    if not isinstance(segmentation, Mapping):
        return f'has a segmentation that is {_UNKNOWN}: {str(segmentation)[:100]}'
    size = segmentation.get('size')
    if 'counts' not in segmentation or not isinstance(size, list | tuple) or list(size) != [height, width]:
        return f'has no RLE of the size of its image, {[height, width]} (height, width)'
    runs = _run_lengths(segmentation['counts'])
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        return f'has an RLE whose counts do not add up to its size, {[height, width]} (height, width)'
    return ''


def _run_lengths(counts: Any) -> np.ndarray | None:
    """The numbers of an RLE, int64; None if they are none.

    Compressed, a number is in characters from '0' on: 5 bits each, the lowest first, a sixth bit where more
    follow; the last one's fifth bit is the sign. From the fourth on it is the difference to the last but one.
    """
    if isinstance(counts, list):
        whole = all(isinstance(count, int) and abs(count) < 2**32 for count in counts)
        return np.array(counts, np.int64) if whole else None
    if not isinstance(counts, str | bytes) or not counts:
        return None
    text = counts.encode() if isinstance(counts, str) else counts
    bits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((bits & 32) == 0)
    if len(last) == 0 or last[-1] != len(bits) - 1 or (bits < 0).any() or (bits > 63).any():
        return None
    first = np.r_[0, last[:-1] + 1]
    if (last - first > 6).any():  # 35 bits are more than any image has pixels
        return None
    place = np.arange(len(bits)) - np.repeat(first, last - first + 1)
    numbers = np.add.reduceat((bits & 31) << 5 * place, first)
    numbers -= np.where(bits[last] & 16, 1 << 5 * (last - first + 1), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


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
