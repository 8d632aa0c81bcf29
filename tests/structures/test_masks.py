import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from mmdet.structures.masks import (
    MaskCrops,
    crop_masks,
    encode_rle,
    masks_to_bitmaps,
    paste_masks,
    segmentation_problem,
    segmentation_to_rle,
)


def paste_whole_image(masks: Tensor, boxes: Tensor, shape: tuple[int, int], threshold: float) -> np.ndarray:
    """Every pixel of the image sampled from the mask, one grid for all."""
    height, width = shape
    y = (torch.arange(height, dtype=masks.dtype) + 0.5)[None, :, None].expand(len(boxes), height, width)
    x = (torch.arange(width, dtype=masks.dtype) + 0.5)[None, None, :].expand(len(boxes), height, width)
    x1, y1, x2, y2 = (c[:, None, None] for c in boxes.unbind(1))
    grid = torch.stack([(x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1], dim=-1)
    return (F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= threshold).numpy()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_pasting_is_sampling_the_whole_image(dtype: torch.dtype) -> None:
    masks = torch.rand(6, 28, 28, dtype=dtype)
    masks[1] = 1.0  # at the edge of the box the probability meets the threshold
    boxes = torch.tensor([
        [3.2, 4.7, 30.1, 22.9], [10., 5., 20., 15.], [-8.5, -3., 12., 9.], [30., 20., 60., 55.],
        [7.3, 7.9, 8.1, 30.], [0., 0., 50., 40.]], dtype=dtype)
    pasted = paste_masks(masks, boxes, (40, 50), 0.5)
    expected = paste_whole_image(masks, boxes, (40, 50), 0.5)
    assert 0 < expected[0].sum() < expected[0].size and expected[1].sum() == 100
    for rle, mask in zip(pasted, expected, strict=True):
        assert rle['size'] == [40, 50] and isinstance(rle['counts'], bytes)
        np.testing.assert_array_equal(coco_mask.decode(rle), mask)


def test_the_threshold_belongs_to_the_mask() -> None:
    mask = torch.full((1, 4, 4), 0.5)
    box = torch.tensor([[0., 0., 4., 4.]])
    assert coco_mask.area(paste_masks(mask, box, (4, 4), 0.5)).item() == 16
    assert coco_mask.area(paste_masks(mask, box, (4, 4), 0.51)).item() == 0


@pytest.mark.parametrize('box', [[5., 5., 5., 9.], [60., 5., 70., 9.], [-9., -9., -2., -2.]],
                         ids=['no width', 'right of the image', 'above and left'])
def test_a_box_without_pixels_gives_an_empty_mask(box: list[float]) -> None:
    rle, = paste_masks(torch.ones(1, 28, 28), torch.tensor([box]), (40, 50), 0.5)
    assert rle['size'] == [40, 50] and coco_mask.area(rle) == 0


def test_no_masks() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (40, 50), 0.5) == []


def test_encoding_is_pycocotools() -> None:
    masks = torch.rand(3, 11, 17) < 0.4
    expected = [coco_mask.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in masks]
    assert encode_rle(masks) == expected


def test_polygons_are_merged() -> None:
    squares = [[1., 1., 5., 1., 5., 5., 1., 5.], [10., 2., 14., 2., 14., 6., 10., 6.]]
    found = coco_mask.decode(segmentation_to_rle(squares, 10, 20))
    expected = np.zeros((10, 20), np.uint8)
    expected[1:5, 1:5] = expected[2:6, 10:14] = 1
    np.testing.assert_array_equal(found, expected)


def test_uncompressed_rle_runs_down_the_columns() -> None:
    found = segmentation_to_rle(dict(size=[3, 4], counts=[4, 2, 6]), 3, 4)
    expected = np.zeros((3, 4), np.uint8)
    expected[1:3, 1] = 1
    np.testing.assert_array_equal(coco_mask.decode(found), expected)


def test_compressed_rle_stays() -> None:
    rle = encode_rle(torch.ones(1, 3, 4))[0]
    assert segmentation_to_rle(rle, 3, 4) == rle


def test_bitmaps_as_crops_and_back() -> None:
    bitmaps = torch.randint(0, 2, (3, 5, 7), dtype=torch.uint8)
    masks = crop_masks(bitmaps)
    assert masks.pixels.shape == (105,) and masks.crops[2].tolist() == [70, 0, 0, 7, 5]
    assert torch.equal(masks_to_bitmaps(masks, (5, 7)), bitmaps)
    none = crop_masks(bitmaps[:0])
    assert none.crops.shape == (0, 5) and masks_to_bitmaps(none, (5, 7)).shape == (0, 5, 7)


def test_a_crop_lies_where_it_was_cut_out() -> None:
    masks = MaskCrops(torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.uint8),
                      torch.tensor([[0, 2, 1, 3, 2], [1, 0, 0, 3, 2], [7, 0, 0, 0, 0]]))
    assert masks_to_bitmaps(masks, (3, 4)).tolist() == [
        [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
        [[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0]] * 3]


@pytest.mark.parametrize('shape', [(1, 1), (40, 50), (700, 900)])
def test_what_pycocotools_writes_is_no_problem(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.5, 1):
        mask = np.asfortranarray(rng.random(shape) < share, np.uint8)
        rle = coco_mask.encode(mask)
        assert segmentation_problem(rle, *shape) == ''
        edges = np.flatnonzero(np.diff(mask.ravel('F'), prepend=0, append=2)).tolist()
        runs = np.diff([0, *edges]).tolist()
        assert segmentation_problem(dict(size=list(shape), counts=runs), *shape) == ''
        assert coco_mask.frPyObjects(dict(size=list(shape), counts=runs), *shape) == rle


@pytest.mark.parametrize('x, far', [
    (100_000, False), (-100_000, False), (1e9, True), (-1e9, True), (float('nan'), True)])
def test_outlines_that_pycocotools_would_have_no_memory_for(x: float, far: bool) -> None:
    assert segmentation_problem([[x, 0, 5, 1, 5, 5]], 10, 10) == (
        'has a polygon with a coordinate that is NaN or beyond 100000 pixels' if far else '')


@pytest.mark.parametrize('counts', [
    [3, 4], [3000], [-3, 2003], [2000.0], ['2000'], 7, None, '', b'', '!', 'a', 'P' * 9 + '1', '1' * 3000])
def test_counts_that_pycocotools_would_not_end_on(counts: object) -> None:
    assert segmentation_problem(dict(size=[40, 50], counts=counts), 40, 50) == (
        'has an RLE whose counts do not add up to its size, [40, 50] (height, width)')


def test_a_mask_cut_short() -> None:
    rle = coco_mask.encode(np.asfortranarray(np.random.default_rng(0).random((40, 50)) < 0.5, np.uint8))
    for end in range(1, len(rle['counts'])):
        assert segmentation_problem(rle | dict(counts=rle['counts'][:end]), 40, 50)
