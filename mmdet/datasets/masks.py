"""Masks on their way through the transforms: run lengths of the original, and which pixel is shown where."""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from mmdet.structures.masks import RLE, MaskCrops


class MaskView(NamedTuple):
    """Masks of an image that is resized (nearest) and mirrored, rasterised only when that is done."""

    rles: list[RLE]
    """G masks of the original image, compressed."""
    rows: np.ndarray
    """(H,) int64: the row of the original that each row of the image shows."""
    columns: np.ndarray
    """(W,) int64."""


def view_masks(rles: list[RLE], shape: tuple[int, int]) -> MaskView:
    """Masks of an original image of ``shape`` (height, width), all of it."""
    return MaskView(rles, np.arange(shape[0]), np.arange(shape[1]))


def resize_masks(masks: MaskView, shape: tuple[int, int]) -> MaskView:
    """Masks resized to ``shape`` (height, width), each pixel from the nearest as in cv2.INTER_NEAREST."""
    return masks._replace(rows=masks.rows[_nearest(len(masks.rows), shape[0])],
                          columns=masks.columns[_nearest(len(masks.columns), shape[1])])


def flip_masks(masks: MaskView) -> MaskView:
    """Masks mirrored left to right."""
    return masks._replace(columns=masks.columns[::-1])


def rasterise_masks(masks: MaskView) -> MaskCrops:
    """The masks' pixels, in the box of each object alone."""
    crops, table, first = [], [], 0
    for rle in masks.rles:
        x, y, width, height = coco_mask.toBbox(rle).astype(int)
        rows = np.flatnonzero((masks.rows >= y) & (masks.rows < y + height))
        columns = np.flatnonzero((masks.columns >= x) & (masks.columns < x + width))
        if not (len(rows) and len(columns)):
            table.append([first, 0, 0, 0, 0])
            continue
        # pycocotools stores columns one after the other: take columns, transpose, take rows.
        taken = coco_mask.decode(rle).T[masks.columns[columns], y:y + height]
        crops.append(cv2.transpose(taken)[masks.rows[rows] - y].ravel())
        table.append([first, columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        first += len(crops[-1])
    pixels = np.concatenate(crops) if crops else np.zeros(0, np.uint8)
    return MaskCrops(torch.from_numpy(pixels), torch.tensor(table, dtype=torch.int64).reshape(-1, 5))


def _nearest(old: int, new: int) -> np.ndarray:
    """The pixel of ``old`` that each of ``new`` pixels shows; the scale is inverted twice, as OpenCV does."""
    return np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(np.int64), old - 1)
