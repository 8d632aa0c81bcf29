"""Mask pasting against grid_sample over the whole image and pycocotools' encoding of it."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from mmdet.ops import paste_masks

NAN, INF = float('nan'), float('inf')


def eager(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> list[bytes]:
    """Every pixel up to one outside the box, sampled with one grid; the compressed run lengths."""
    y = torch.arange(height, dtype=masks.dtype)[None, :, None].expand(len(boxes), height, width)
    x = torch.arange(width, dtype=masks.dtype)[None, None, :].expand(len(boxes), height, width)
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.to(masks.dtype).unbind(1))
    grid = torch.stack([(x + 0.5 - x1) / (x2 - x1) * 2 - 1, (y + 0.5 - y1) / (y2 - y1) * 2 - 1], dim=-1)
    sampled = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    near = ((x >= x1.floor() - 1) & (x < x2.ceil() + 1) & (y >= y1.floor() - 1) & (y < y2.ceil() + 1)
            & (x2 > x1) & (y2 > y1))
    images = ((sampled >= threshold) & near).numpy().astype(np.uint8)
    return [coco_mask.encode(np.asfortranarray(image))['counts'] for image in images]


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> list[bytes]:
    texts, lengths = paste_masks(masks, boxes, height, width, threshold)
    assert texts.dtype == torch.uint8 and lengths.dtype == torch.int64
    assert texts.device.type == lengths.device.type == 'cpu'
    ends = lengths.cumsum(0).tolist()
    assert len(texts) == (ends[-1] if ends else 0)
    return [bytes(texts[a:b].tolist()) for a, b in zip([0, *ends], ends)]


def make_boxes(count: int, height: int, width: int) -> Tensor:
    """From slivers to more than the image, some of them partly or wholly outside."""
    image = torch.tensor([width, height])
    centres, sizes = (torch.rand(count, 2) * 1.4 - 0.2) * image, torch.rand(count, 2)**2 * image * 1.5
    return torch.cat([centres - sizes / 2, centres + sizes / 2], 1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('height, width, size', [
    (130, 90, 28), (64, 40, 14), (7, 200, 5), (1, 1, 28), (50, 50, 1)])
def test_the_bits_of_grid_sample_and_pycocotools(device, dtype, height, width, size):
    boxes = make_boxes(40, height, width).to(dtype)
    for threshold in (0.5, 0.3, 0.0, 1.0):
        for masks in (torch.rand(40, size, size, dtype=dtype),
                      torch.rand(40, size, size, dtype=dtype).round(),
                      (torch.rand(40, size, size, dtype=dtype) * 4).round() / 4):
            assert (pasted(masks.to(device), boxes.to(device), height, width, threshold)
                    == eager(masks, boxes, height, width, threshold))


def test_probabilities_that_meet_the_threshold(device):
    """Rounding alone decides which pixels of a constant mask reach it."""
    boxes = make_boxes(60, 90, 120)
    masks = torch.full((60, 28, 28), 0.7)
    expected = eager(masks, boxes, 90, 120, 0.7)
    assert max(map(len, expected)) > 200  # ragged, not the rectangle
    assert pasted(masks.to(device), boxes.to(device), 90, 120, 0.7) == expected


@pytest.mark.parametrize('height', [63, 64, 65, 128, 200])
def test_full_columns_are_one_run(device, height):
    masks, boxes = torch.ones(2, 4, 4), torch.tensor([[-100., -100, 300, 300], [3, -100, 9, 300]])
    area = coco_mask.encode(np.ones((height, 20), np.uint8, order='F'))['counts']
    stripe = np.zeros((height, 20), np.uint8, order='F')
    stripe[:, 3:9] = 1
    assert (pasted(masks.to(device), boxes.to(device), height, 20, 0.5)
            == [area, coco_mask.encode(stripe)['counts']])


@pytest.mark.parametrize('box', [
    [5, 5, 5, 9], [5, 9, 9, 5], [60, 5, 70, 9], [-9, -9, -3, -3], [NAN, 0, 9, 9], [0, 0, 9, NAN],
    [0, 0, INF, 9], [-INF, -INF, INF, INF], [1e30, 0, 2e30, 9]], ids=str)
def test_boxes_without_pixels(device, box):
    masks, boxes = torch.ones(1, 28, 28), torch.tensor([box]).float()
    texts = pasted(masks.to(device), boxes.to(device), 40, 50, 0.5)
    assert texts == [coco_mask.encode(np.zeros((40, 50), np.uint8, order='F'))['counts']]


def test_huge_boxes(device):
    boxes = torch.tensor([[-1e30, -1e30, 1e30, 1e30], [-3e38, 0, 3e38, 40], [-1e6, -1e6, 1e6, 1e6]])
    masks = torch.rand(3, 28, 28) + 0.6
    assert pasted(masks.to(device), boxes.to(device), 40, 50, 0.5) == eager(masks, boxes, 40, 50, 0.5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_pasted_in_float32(device, dtype):
    masks, boxes = torch.rand(20, 28, 28).to(dtype), make_boxes(20, 400, 500)
    expected = eager(masks.float(), boxes, 400, 500, 0.5)
    assert pasted(masks.to(device), boxes.to(device), 400, 500, 0.5) == expected
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert pasted(masks.to(device), boxes.to(device), 400, 500, 0.5) == expected
    rounded = boxes.to(dtype)
    assert (pasted(masks.to(device), rounded.to(device), 400, 500, 0.5)
            == eager(masks.float(), rounded.float(), 400, 500, 0.5))


def test_empty_and_strided(device):
    empty = torch.zeros(0, 28, 28, device=device), torch.zeros(0, 4, device=device)
    texts, lengths = paste_masks(*empty, 40, 50, 0.5)
    assert texts.shape == lengths.shape == (0,)

    masks, boxes = torch.rand(8, 28, 28), make_boxes(8, 40, 50)
    expected = eager(masks, boxes, 40, 50, 0.5)
    wide = torch.stack([boxes, boxes + 1], 1).reshape(8, 8).to(device)[:, :4]
    last = masks.permute(1, 2, 0).contiguous().to(device).permute(2, 0, 1)
    assert not wide.is_contiguous() and not last.is_contiguous()
    assert pasted(last, wide, 40, 50, 0.5) == expected


def test_threads_do_not_matter():
    masks, boxes = torch.rand(50, 28, 28), make_boxes(50, 100, 100)
    texts = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        texts.append(pasted(masks, boxes, 100, 100, 0.5))
    assert texts[0] == texts[1]


def test_errors(device):
    masks, boxes = torch.rand(3, 28, 28, device=device), torch.rand(3, 4, device=device)
    for arguments, error, message in [
            ((masks[0], boxes, 9, 9, 0.5), ValueError, r'masks must be \(N, M, M\), got \[28, 28\]'),
            ((masks[:, 1:], boxes, 9, 9, 0.5), ValueError, r'masks must be \(N, M, M\), got \[3, 27, 28\]'),
            ((masks, boxes[:2], 9, 9, 0.5), ValueError, r'boxes must be \(3, 4\), got \[2, 4\]'),
            ((masks.int(), boxes, 9, 9, 0.5), TypeError, 'must be floating point, got Int and Float'),
            ((masks, boxes, 0, 9, 0.5), ValueError, 'the image must have pixels, got height 0 and width 9')]:
        with pytest.raises(error, match=message) as caught:
            paste_masks(*arguments)
        assert '\n' not in str(caught.value)


@pytest.mark.cuda
def test_mixed_devices():
    with pytest.raises(ValueError, match='masks are on cuda:0 but boxes on cpu'):
        paste_masks(torch.rand(3, 28, 28, device='cuda'), torch.rand(3, 4), 9, 9, 0.5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_opcheck(device, dtype):
    masks, boxes = torch.rand(5, 28, 28).to(device, dtype), make_boxes(5, 40, 50).to(device, dtype)
    torch.library.opcheck(torch.ops.mmdet.paste_masks.default, (masks, boxes, 40, 50, 0.5))


def test_compile(device):
    masks, boxes = torch.rand(5, 28, 28, device=device), make_boxes(5, 40, 50).to(device)

    def paste(masks: Tensor) -> tuple[Tensor, Tensor]:
        texts, lengths = paste_masks(masks.sigmoid(), boxes, 40, 50, 0.6)
        return texts + 1, lengths * 2

    compiled = torch.compile(paste, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(masks), paste(masks))
