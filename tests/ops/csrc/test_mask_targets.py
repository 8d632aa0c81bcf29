"""Mask targets against RoIAlign of bitmaps of the whole image, in float64."""
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from mmdet.ops import mask_targets

SHAPE = (61, 83)
NAN, INF = float('nan'), float('inf')


def make_masks(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise in crops of all sizes, some without pixels, and the bitmaps (G, H, W) of them."""
    bitmaps = torch.zeros(count, *SHAPE, dtype=torch.uint8)
    pixels, rows, first = [], [], 0
    for bitmap in bitmaps:
        y1, y2 = torch.randint(0, SHAPE[0] + 1, (2,)).sort().values.tolist()
        x1, x2 = torch.randint(0, SHAPE[1] + 1, (2,)).sort().values.tolist()
        crop = (torch.rand(y2 - y1, x2 - x1) < 0.7).to(torch.uint8)
        bitmap[y1:y2, x1:x2] = crop
        pixels.append(crop.flatten())
        rows.append([first, x1, y1, x2, y2])
        first += crop.numel()
    return torch.cat(pixels), torch.tensor(rows), bitmaps


def make_boxes(count: int) -> Tensor:
    """Up to the whole image, some of them partly or wholly outside or without area."""
    corner = torch.rand(count, 2) * torch.tensor([100., 75.]) - 10
    return torch.cat([corner, corner + torch.rand(count, 2)**2 * 80 - 1], 1)


def expected_targets(bitmaps: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """One sample a pixel, in float64; points are those of the dtype of the boxes."""
    rois = torch.cat([matched[:, None], boxes], 1)
    maps = bitmaps[:, None].to(boxes.dtype)
    return torchvision.ops.roi_align(maps, rois.to(boxes.dtype), size, 1.0, aligned=True)[:, 0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('size', [1, 7, 28])
def test_covered_bins(device: torch.device, dtype: torch.dtype, size: int) -> None:
    pixels, crops, bitmaps = make_masks(9)
    boxes, matched = make_boxes(600).to(dtype), torch.randint(0, 9, (600,))
    given = (part.to(device) for part in (pixels, crops, boxes, matched))
    found = mask_targets(*given, SHAPE, size).cpu()
    assert found.dtype == torch.bool and found.shape == (600, size, size)
    expected = expected_targets(bitmaps, boxes, matched, size)
    clear = (expected - 0.5).abs() > 1e-5  # else torchvision's rounding decides
    assert torch.equal(found[clear], (expected >= 0.5)[clear])
    assert clear.float().mean() > 0.9 and 0 < found.sum() < found.numel()


def test_half_a_bin_is_covered(device: torch.device) -> None:
    """Every other column belongs to the object; of some counts of samples the inverse is rounded."""
    bitmap = torch.zeros(SHAPE, dtype=torch.uint8)
    bitmap[:, 1::2] = 1
    bins = torch.tensor([[2, 3], [6, 5], [14, 7], [10, 9], [16, 11]])
    boxes = torch.cat([torch.zeros(5, 2), bins * 5.0], 1)
    # The second half lies between columns and rows.
    boxes = torch.cat([boxes, boxes + torch.tensor([0.5, 0.25, 0.5, 0.25])])
    crops = torch.tensor([[0, 0, 0, SHAPE[1], SHAPE[0]]])
    given = (part.to(device) for part in (bitmap.flatten(), crops, boxes, torch.zeros(10, dtype=torch.int64)))
    assert mask_targets(*given, SHAPE, 5).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_boxes_are_computed_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    pixels, crops, _ = make_masks(4)
    boxes, matched = make_boxes(30).to(dtype), torch.randint(0, 4, (30,))
    given = [part.to(device) for part in (pixels, crops, boxes, matched)]
    found = mask_targets(*given, SHAPE, 14)
    given[2] = given[2].float()
    assert torch.equal(found, mask_targets(*given, SHAPE, 14)) and found.any()


def test_any_strides(device: torch.device) -> None:
    pixels, crops, _ = make_masks(5)
    boxes, matched = make_boxes(40), torch.randint(0, 5, (40,))
    given = [part.to(device) for part in (pixels, crops, boxes, matched)]
    strided = [part.repeat_interleave(2, dim=0)[::2] for part in given]
    strided[1:3] = [part.t().contiguous().t() for part in given[1:3]]
    assert not any(part.is_contiguous() for part in strided)
    assert torch.equal(mask_targets(*strided, SHAPE, 9), mask_targets(*given, SHAPE, 9))


def test_all_pixels_but_zeros_are_the_object(device: torch.device) -> None:
    pixels, crops, _ = make_masks(5)
    given = [part.to(device) for part in (crops, make_boxes(40), torch.randint(0, 5, (40,)))]
    found, expected = (mask_targets(part.to(device), *given, SHAPE, 9) for part in (pixels * 255, pixels))
    assert torch.equal(found, expected) and found.any()


def test_boxes_that_are_not_finite_cover_nothing(device: torch.device) -> None:
    pixels = torch.ones(SHAPE[0] * SHAPE[1], dtype=torch.uint8)
    crops = torch.tensor([[0, 0, 0, SHAPE[1], SHAPE[0]]])
    boxes = torch.tensor([[0., 0., 40., 40.], [NAN, 0., 40., 40.], [0., NAN, 40., NAN], [0., 0., INF, 40.],
                          [20., 20., 20., 30.], [30., 30., 20., 20.]])
    given = (part.to(device) for part in (pixels, crops, boxes, torch.zeros(6, dtype=torch.int64)))
    found = mask_targets(*given, SHAPE, 4)
    assert found[0].all() and not found[1:].any()


def test_nothing(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    pixels, crops = none.to(torch.uint8), none.view(0, 5)
    assert mask_targets(pixels, crops, torch.zeros(0, 4, device=device), none, SHAPE, 28).shape == (0, 28, 28)
    crop, box = crops.new_tensor([[0, 3, 3, 3, 3]]), torch.tensor([[0., 0., 9., 9.]], device=device)
    assert not mask_targets(pixels, crop, box, none.new_zeros(1), SHAPE, 28).any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    pixels, crops, _ = make_masks(3)
    given = [part.to(device) for part in (pixels, crops, make_boxes(8).to(dtype), torch.randint(0, 3, (8,)))]
    torch.library.opcheck(torch.ops.mmdet.mask_targets.default, (*given, *SHAPE, 5))


GOOD: dict[str, Any] = dict(
    pixels=torch.ones(20, dtype=torch.uint8), crops=torch.tensor([[0, 1, 1, 6, 5]]), boxes=torch.ones(2, 4),
    matched=torch.zeros(2, dtype=torch.int64), shape=SHAPE, size=28)


@pytest.mark.parametrize('error, change, message', [
    (ValueError, dict(crops=torch.zeros(1, 4, dtype=torch.int64)), r'crops \(G, 5\), got \[20\] and \[1, 4'),
    (ValueError, dict(boxes=torch.ones(2, 5)), r'boxes must be \(P, 4\) and matched \(P,\), got \[2, 5\]'),
    (ValueError, dict(matched=torch.zeros(3, dtype=torch.int64)), r'got \[2, 4\] and \[3\]'),
    (ValueError, dict(shape=(0, 5)), 'must be positive, got 0, 5 and 28'),
    (ValueError, dict(shape=(2**31, 5)), 'height and width must be at most 2147483647, got 2147483648 and 5'),
    (ValueError, dict(size=0), 'must be positive, got 61, 83 and 0'),
    (TypeError, dict(pixels=torch.ones(20)), 'pixels must be uint8, crops and matched int64, got Float'),
    (TypeError, dict(boxes=torch.ones(2, 4, dtype=torch.int64)), 'boxes must be floating point, got Long'),
], ids=str)
def test_wrong_arguments(
    device: torch.device, error: type[Exception], change: dict[str, Any], message: str
) -> None:
    arguments = {key: value.to(device) if isinstance(value, Tensor) else value
                 for key, value in (GOOD | change).items()}
    with pytest.raises(error, match=message):
        mask_targets(**arguments)


@pytest.mark.parametrize('change, message', [
    (dict(matched=torch.tensor([0, 1])), r'matched\[1\] names object 1 of 1'),
    (dict(matched=torch.tensor([-1, 0])), r'matched\[0\] names object -1 of 1'),
    (dict(crops=torch.tensor([[0, 1, 1, 6, 6]])), r'crops\[0\] leaves the image or the pixels'),
    (dict(crops=torch.tensor([[0, 80, 1, 84, 2]])), r'crops\[0\] leaves'),
    (dict(crops=torch.tensor([[2**63 - 1, 0, 0, 2, 2]])), r'crops\[0\] leaves'),
    (dict(crops=torch.tensor([[0, 3, 1, 1, 2]])), r'crops\[0\] leaves'),
], ids=str)
def test_wrong_indices_on_the_cpu(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IndexError, match=message):
        mask_targets(**(GOOD | change))
