"""Free functions on instance masks: rasterise, crop to RoIs, paste into images, COCO RLE."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

RLE = dict[str, Any]
"""COCO run-length encoding: {'size': [height, width], 'counts': bytes}."""


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
    (Mask R-CNN, arXiv 1703.06870, section 3.1). ``shape`` is (height, width). One mask is pasted
    and encoded at a time, so memory does not grow with N.
    """
    height, width = shape
    rles = []
    for probabilities, box in zip(masks, boxes):
        x1, y1, x2, y2 = box.tolist()
        # One pixel of margin: outside the box padding has more than half the weight, so nothing reaches 0.5.
        left, right = max(int(np.floor(x1)) - 1, 0), min(int(np.ceil(x2)) + 1, width)
        top, bottom = max(int(np.floor(y1)) - 1, 0), min(int(np.ceil(y2)) + 1, height)
        image = torch.zeros(height, width, dtype=torch.uint8)
        if right > left and bottom > top and x2 > x1 and y2 > y1:
            xs = torch.arange(left, right, device=masks.device, dtype=masks.dtype) + 0.5
            ys = torch.arange(top, bottom, device=masks.device, dtype=masks.dtype) + 0.5
            xs = (xs - box[0]) / (box[2] - box[0]) * 2 - 1
            ys = (ys - box[1]) / (box[3] - box[1]) * 2 - 1
            grid = torch.stack([xs.expand(len(ys), -1), ys[:, None].expand(-1, len(xs))], dim=-1)
            sampled = F.grid_sample(probabilities[None, None], grid[None], align_corners=False)[0, 0]
            image[top:bottom, left:right] = (sampled >= threshold).to('cpu', torch.uint8)
        rles += encode_rle(image[None])
    return rles
