"""Masks kept as run lengths against bitmaps that OpenCV resizes and mirrors."""
import cv2
import numpy as np
import pytest
import torch

from mmdet.datasets.masks import flip_masks, rasterise_masks, resize_masks, view_masks
from mmdet.structures.masks import encode_rle, masks_to_bitmaps


def make_bitmaps(height: int, width: int) -> np.ndarray:
    """A disc, a pixel in a corner, nothing, everything, noise, and a stripe of whole columns."""
    y, x = np.mgrid[:height, :width]
    bitmaps = np.zeros((6, height, width), np.uint8)
    bitmaps[0] = (x - width / 2)**2 + (y - height / 3)**2 < (height / 4)**2
    bitmaps[1, -1, -1] = 1
    bitmaps[3] = 1
    bitmaps[4] = np.random.default_rng(0).integers(0, 2, (height, width))
    bitmaps[5, :, width // 3:width // 2] = 1
    return bitmaps


@pytest.mark.parametrize('size', [(40, 50), (97, 31), (1, 7)])
@pytest.mark.parametrize('shapes', [[], [(80, 100)], [(23, 67)], [(97, 31), (400, 11)], [(1, 1)]], ids=str)
@pytest.mark.parametrize('flip', [False, True])
def test_resized_and_mirrored_as_by_opencv(size, shapes, flip):
    expected = make_bitmaps(*size)
    masks = view_masks(encode_rle(torch.from_numpy(expected)), size)
    for i, shape in enumerate(shapes):
        masks = resize_masks(masks, shape)
        expected = np.stack([
            cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST) for mask in expected])
        if flip and i == 0:  # between the two resizes
            masks, expected = flip_masks(masks), expected[:, :, ::-1]
    crops = rasterise_masks(masks)
    np.testing.assert_array_equal(masks_to_bitmaps(crops, expected.shape[1:]), expected)
    # Of the corner's pixel no more is kept than resizing made of it; nothing is nothing.
    _, x1, y1, x2, y2 = crops.crops[1].tolist()
    assert (x2 - x1) * (y2 - y1) == expected[1].sum() and crops.crops[2, 1:].tolist() == [0, 0, 0, 0]


def test_nearest_is_that_of_opencv_for_any_two_sizes():
    rng = np.random.default_rng(1)
    for old, new in rng.integers(1, 1400, (500, 2)).tolist():
        pixels = np.arange(old, dtype=np.float32)[None]
        expected = cv2.resize(pixels, (new, 1), interpolation=cv2.INTER_NEAREST)[0]
        np.testing.assert_array_equal(resize_masks(view_masks([], (1, old)), (1, new)).columns, expected)


def test_no_masks():
    masks = flip_masks(resize_masks(view_masks([], (4, 6)), (8, 3)))
    crops = rasterise_masks(masks)
    assert masks_to_bitmaps(crops, (8, 3)).shape == (0, 8, 3)
    assert [(part.shape, part.dtype) for part in crops] == [((0,), torch.uint8), ((0, 5), torch.int64)]
