"""NMS against torchvision, soft-NMS against a plain float64 loop."""
import math

import pytest
import torch
import torchvision
from torch import Tensor

from mmdet.ops import batched_nms, nms, soft_nms

NAN = float('nan')


def make_boxes(count: int, size: float = 100) -> Tensor:
    corners = torch.rand(count, 2) * size
    return torch.cat([corners, corners + torch.rand(count, 2) * 40], 1)


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if inter > 0 else 0.0


def soft_nms_loop(
        boxes: Tensor, scores: Tensor, threshold: float, sigma: float, min_score: float, method: str
) -> tuple[list[float], list[int]]:
    """Soft-NMS of float64 boxes, by its definition."""
    corners, left, kept = boxes.tolist(), dict(enumerate(scores.tolist())), []
    while True:
        left = {i: score for i, score in left.items() if score >= min_score}
        if not left:
            return [score for _, score in kept], [i for i, _ in kept]
        best = max(left, key=lambda i: (left[i], -i))
        kept.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(corners[best], corners[i])
            if method == 'gaussian':
                left[i] *= math.exp(-overlap**2 / sigma)
            elif overlap > threshold and method == 'linear':
                left[i] *= 1 - overlap
            elif overlap > threshold:
                del left[i]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('threshold', [0.0, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize('count', [1, 63, 64, 65, 700])
def test_nms_equals_torchvision(device, dtype, threshold, count):
    boxes = make_boxes(count).to(dtype)
    scores = (torch.rand(count) * 50).round().to(dtype) / 50  # with ties
    expected = torchvision.ops.nms(boxes, scores, threshold)
    keep = nms(boxes.to(device), scores.to(device), threshold)
    assert keep.dtype == torch.int64
    assert torch.equal(keep.cpu(), expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_nms_computes_half_precision_in_float32(device, dtype):
    boxes, scores = make_boxes(200).to(device, dtype), torch.rand(200).to(device, dtype)
    expected = torchvision.ops.nms(boxes.cpu().float(), scores.cpu().float(), 0.3)
    assert torch.equal(nms(boxes, scores, 0.3).cpu(), expected)


def test_batched_nms_is_nms_of_each_group(device):
    boxes, scores = make_boxes(400).to(device) + 1e5, torch.rand(400).to(device)
    groups = torch.randint(0, 7, (400,)).to(device) * 10**12 - 3
    expected = torch.cat([
        members[nms(boxes[members], scores[members], 0.4)]
        for group in groups.unique() for members in [(groups == group).nonzero()[:, 0]]])
    expected = expected[scores[expected].argsort(descending=True)]
    keep = batched_nms(boxes, scores, groups, 0.4)
    assert torch.equal(keep, expected)
    assert len(keep) > len(nms(boxes, scores, 0.4))


def test_groups_of_any_size(device):
    """A GPU takes 64 boxes at a time, 256 of a group in a turn: groups begin and end inside and between."""
    sizes = [1, 2, 60, 64, 65, 129, 3, 1000, 1, 256, 257, 512]
    groups = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])[torch.randperm(sum(sizes))]
    boxes, scores = make_boxes(len(groups)), torch.randperm(len(groups)).float()
    scores[::17] = torch.nan
    expected = []
    for i in range(len(sizes)):
        members = ((groups == i) & ~scores.isnan()).nonzero()[:, 0]
        expected.append(members[torchvision.ops.nms(boxes[members], scores[members], 0.5)])
    kept = torch.cat(expected)
    kept = kept[scores[kept].argsort(descending=True)]
    found = batched_nms(boxes.to(device), scores.to(device), groups.to(device), 0.5)
    assert torch.equal(found.cpu(), kept) and 200 < len(kept) < 1950


def test_iou_of_exactly_the_threshold_stays(device):
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 2.1]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes[:2], scores[:2], 0.499).tolist() == [0]
    # 1/3 in float32 is above 1/3 in float64: torchvision's comparison in float64 suppresses.
    thirds = torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 1]], device=device)
    expected = torchvision.ops.nms(thirds.cpu(), scores[:2].cpu(), 1 / 3).tolist()
    assert nms(thirds, scores[:2], 1 / 3).tolist() == expected


def test_boxes_without_area_are_kept(device):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [3, 0, 3, 10]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6], device=device)
    assert nms(boxes, scores, 0.0).tolist() == [0, 1, 2, 3]
    for method in ('linear', 'gaussian', 'naive'):
        kept, kept_scores, keep = soft_nms(boxes, scores, method=method)
        assert keep.tolist() == [0, 1, 2, 3]
        torch.testing.assert_close(kept_scores, scores)


def test_nan_scores_are_never_kept(device):
    boxes = make_boxes(130).to(device)
    scores = torch.rand(130, device=device)
    scores[::3] = NAN
    scores[1] = -float('inf')
    numbers = (~scores.isnan()).nonzero()[:, 0]
    expected = numbers[nms(boxes[numbers], scores[numbers], 0.3)]
    assert torch.equal(nms(boxes, scores, 0.3), expected)
    assert torch.equal(batched_nms(boxes, scores, torch.zeros_like(scores).long(), 0.3), expected)
    assert not soft_nms(boxes, scores)[1].isnan().any()
    nothing = torch.full((130,), NAN, device=device)
    assert nms(boxes, nothing, 0.3).tolist() == soft_nms(boxes, nothing)[2].tolist() == []


def test_nan_boxes_touch_no_other(device):
    boxes = torch.tensor([[NAN, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 8]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert soft_nms(boxes, scores, method='naive')[2].tolist() == [0, 1]


def test_empty_and_strided(device):
    empty = torch.zeros(0, 4, device=device), torch.zeros(0, device=device)
    assert nms(*empty, 0.5).shape == (0,) and nms(*empty, 0.5).dtype == torch.int64
    assert batched_nms(*empty, torch.zeros(0, dtype=torch.int64, device=device), 0.5).shape == (0,)
    assert [tuple(part.shape) for part in soft_nms(*empty)] == [(0, 4), (0,), (0,)]

    boxes, scores = make_boxes(100).to(device), torch.rand(100, device=device)
    groups = torch.arange(100, device=device) % 3
    wide = torch.stack([boxes, boxes + 1], 1).reshape(100, 8)[:, :4]
    pairs, group_pairs = torch.stack([scores, scores], 1)[:, 0], torch.stack([groups, groups], 1)[:, 0]
    assert not wide.is_contiguous() and not pairs.is_contiguous() and not group_pairs.is_contiguous()
    assert torch.equal(nms(wide, pairs, 0.3), nms(boxes, scores, 0.3))
    assert torch.equal(batched_nms(wide, pairs, group_pairs, 0.3), batched_nms(boxes, scores, groups, 0.3))
    assert torch.equal(soft_nms(wide, pairs)[1], soft_nms(boxes, scores)[1])
    assert torch.equal(nms(boxes.t().contiguous().t(), scores, 0.3), nms(boxes, scores, 0.3))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('method', ['linear', 'gaussian', 'naive'])
@pytest.mark.parametrize('threshold, sigma, min_score', [(0.3, 0.5, 1e-3), (0.1, 0.1, 0.2), (0.6, 1.0, 0.0)])
def test_soft_nms_follows_its_definition(device, dtype, method, threshold, sigma, min_score):
    boxes, scores = make_boxes(150).to(dtype), torch.rand(150).to(dtype)
    expected_scores, expected = soft_nms_loop(boxes, scores, threshold, sigma, min_score, method)
    kept, kept_scores, keep = soft_nms(
        boxes.to(device), scores.to(device), threshold, sigma, min_score, method)
    assert keep.tolist() == expected
    torch.testing.assert_close(kept_scores.cpu(), torch.tensor(expected_scores).to(dtype))
    assert torch.equal(kept.cpu(), boxes[expected])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_soft_nms_half_precision_keeps_its_dtype(device, dtype):
    boxes, scores = make_boxes(50).to(device, dtype), torch.rand(50).to(device, dtype)
    kept, kept_scores, keep = soft_nms(boxes, scores)
    reference = soft_nms(boxes.float(), scores.float())
    assert kept.dtype == kept_scores.dtype == dtype
    assert torch.equal(keep, reference[2]) and torch.equal(kept_scores, reference[1].to(dtype))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_soft_nms_takes_float64_scores_as_they_are(device, dtype):
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6]], dtype=dtype, device=device)
    scores = torch.tensor([0.1, 0.1 + 1e-12], dtype=torch.float64, device=device)
    _, kept_scores, keep = soft_nms(boxes, scores)
    assert keep.tolist() == [1, 0] and torch.equal(kept_scores, scores.flip(0))


@pytest.mark.parametrize('method', ['linear', 'gaussian', 'naive'])
def test_soft_nms_of_areas_beyond_float32(device, method):
    boxes = torch.tensor([[0, 0, 1e20, 1e20], [0, 0, 1e20, 1e20], [0, 0, 2e20, 2e20]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    assert soft_nms(boxes, scores, method=method)[2].tolist() == [0, 1, 2]


def test_inputs_are_left_alone(device):
    boxes, scores = make_boxes(30).to(device), torch.rand(30, device=device)
    copies = boxes.clone(), scores.clone()
    nms(boxes, scores, 0.3), soft_nms(boxes, scores)
    assert torch.equal(boxes, copies[0]) and torch.equal(scores, copies[1])


def test_errors(device):
    boxes, scores = make_boxes(3).to(device), torch.rand(3, device=device)
    for call, error, message in [
            (lambda: nms(boxes[:, :3], scores, 0.5), ValueError, r'boxes must be \(N, 4\), got \[3, 3\]'),
            (lambda: nms(boxes, scores[:2], 0.5), ValueError, r'scores must be \(3,\), got \[2\]'),
            (lambda: nms(boxes.int(), scores, 0.5), TypeError, 'must be floating point, got Int and Float'),
            (lambda: batched_nms(boxes, scores, scores, 0.5), TypeError, 'groups must be int64, got Float'),
            (lambda: batched_nms(boxes, scores, scores[:2].long(), 0.5), ValueError, 'groups must be'),
            (lambda: soft_nms(boxes[0], scores), ValueError, r'soft_nms: boxes must be \(N, 4\), got \[4\]'),
            (lambda: soft_nms(boxes, scores, sigma=0.0), ValueError, 'sigma must be positive, got 0'),
            (lambda: soft_nms(boxes, scores, sigma=1e-50), ValueError, 'sigma must be positive, got 1e-50'),
            (lambda: soft_nms(boxes, scores, method='hard'), ValueError,
             "method must be 'linear', 'gaussian' or 'naive', got 'hard'")]:
        with pytest.raises(error, match=message) as caught:
            call()
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_opcheck(device, dtype):
    boxes, scores = make_boxes(20).to(device, dtype), torch.rand(20).to(device, dtype)
    for groups in (None, torch.arange(20, device=device) % 2):
        torch.library.opcheck(torch.ops.mmdet.nms.default, (boxes, scores, groups, 0.5))
    torch.library.opcheck(torch.ops.mmdet.soft_nms.default, (boxes, scores, 0.3, 0.5, 1e-3, 'gaussian'))


def test_autocast(device):
    boxes, scores = make_boxes(100).to(device) + 1000, torch.rand(100, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(nms(boxes, scores, 0.3), nms(boxes.cpu(), scores.cpu(), 0.3).to(device))
        assert soft_nms(boxes, scores)[1].dtype == torch.float32


def select(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    kept, kept_scores, _ = soft_nms(boxes, scores)
    return boxes[batched_nms(boxes, scores, groups, 0.3)] * 2, (kept * kept_scores[:, None]).sum(0)


def test_compile_and_export(device):
    class Select(torch.nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
            return select(boxes, scores, groups)

    args = make_boxes(40).to(device), torch.rand(40, device=device), torch.arange(40, device=device) % 2
    expected = select(*args)
    torch.testing.assert_close(torch.compile(select, fullgraph=True, backend='aot_eager')(*args), expected)
    program = torch.export.export(Select(), args)
    assert 'mmdet.nms' in str(program.graph)
    torch.testing.assert_close(program.module()(*args), expected)
