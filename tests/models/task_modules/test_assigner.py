import pytest
import torch
import torchvision
from torch import Tensor

from mmdet.models.task_modules.assigner import BACKGROUND, IGNORED, MaxIoUAssigner

RPN = dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3)
RCNN = dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5)
NONE = torch.zeros(0, 4)


def slow_assign(boxes: Tensor, gts: Tensor, pos_iou_thr: float, neg_iou_thr: float, min_pos_iou: float,
                match_low_quality: bool = True) -> list[int]:
    """The rules one box after the other, then one object after the other."""
    overlaps = torchvision.ops.box_iou(boxes, gts).tolist()
    result = []
    for row in overlaps:
        best = max(row)
        if best >= pos_iou_thr:
            result.append(row.index(best))
        else:
            result.append(BACKGROUND if best < neg_iou_thr else IGNORED)
    if match_low_quality:
        for gt in range(len(gts)):
            column = [row[gt] for row in overlaps]
            if max(column) >= min_pos_iou:
                for i, overlap in enumerate(column):
                    if overlap == max(column):
                        result[i] = gt
    return result


@pytest.mark.parametrize('low_quality', [True, False])
@pytest.mark.parametrize('cfg', [RPN, RCNN], ids=['rpn', 'rcnn'])
def test_against_the_slow_loop(cfg: dict, low_quality: bool) -> None:
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        # Whole numbers, so that many overlaps tie.
        corner = torch.randint(0, 12, (300, 2)).float()
        boxes = torch.cat([corner, corner + torch.randint(2, 9, (300, 2))], dim=1)
        gts = boxes[torch.randperm(300)[:6]] + torch.randint(-1, 2, (6, 4)) * torch.tensor([0, 0, 1, 1])
        gts[5] = gts[0]  # the same object twice: the later one wins
        gts[4] = torch.tensor([40., 40., 50., 50.])  # nothing near it
        found = MaxIoUAssigner(**cfg, match_low_quality=low_quality).assign(boxes, gts, NONE)
        assert found.dtype == torch.int64
        expected = slow_assign(boxes, gts, **cfg, match_low_quality=low_quality)
        assert found.tolist() == expected
        seen |= set(expected)
    assert {BACKGROUND, 1, 2, 3} | ({IGNORED} if cfg is RPN else set()) <= seen


def test_thresholds_by_hand() -> None:
    gt = torch.tensor([[0., 0., 10., 10.]])
    overlaps = [1.0, 0.7, 0.5, 0.3, 0.2]
    boxes = torch.tensor([[0., 0., 10 * o, 10.] for o in overlaps], dtype=torch.float64)
    found = MaxIoUAssigner(**RPN).assign(boxes, gt.double(), NONE.double())
    assert found.tolist() == [0, 0, IGNORED, IGNORED, BACKGROUND]


def test_an_object_keeps_all_its_best_boxes_of_low_quality() -> None:
    gt = torch.tensor([[0., 0., 10., 10.]])
    boxes = torch.tensor([[0., 0., 4., 10.], [6., 0., 10., 10.], [0., 0., 3., 10.]])
    assert MaxIoUAssigner(**RPN).assign(boxes, gt, NONE).tolist() == [0, 0, IGNORED]
    assert MaxIoUAssigner(**RPN, match_low_quality=False).assign(boxes, gt, NONE).tolist() == [IGNORED] * 3
    assert MaxIoUAssigner(0.7, 0.3, 0.45).assign(boxes, gt, NONE).tolist() == [IGNORED] * 3


def test_a_later_object_wins_even_against_a_better_overlap() -> None:
    # The only box near the second object is the first object's own.
    gts = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 20.]])
    boxes = torch.tensor([[0., 0., 10., 10.]])
    assert MaxIoUAssigner(**RPN).assign(boxes, gts, NONE).tolist() == [1]


def test_without_objects_all_is_background() -> None:
    boxes = torch.tensor([[0., 0., 4., 4.], [2., 2., 9., 9.]])
    assert MaxIoUAssigner(**RPN).assign(boxes, NONE, NONE).tolist() == [BACKGROUND] * 2
    assert MaxIoUAssigner(**RPN, ignore_iof_thr=0.5).assign(NONE, boxes, boxes).shape == (0,)


def test_ignored_regions_shield_negatives_alone_and_only_if_asked() -> None:
    gts = torch.tensor([[0., 0., 10., 10.]])
    crowd = torch.tensor([[0., 0., 40., 40.]])
    boxes = torch.tensor([[0., 0., 10., 10.],  # positive, inside the crowd
                          [20., 20., 30., 30.],  # negative, inside the crowd
                          [30., 30., 50., 50.],  # negative, a quarter inside
                          [60., 60., 70., 70.],  # negative, outside
                          [30., 0., 50., 10.]])  # negative, half inside: not more than the threshold
    for cfg in (RCNN, RCNN | dict(ignore_iof_thr=0)):
        assert MaxIoUAssigner(**cfg).assign(boxes, gts, crowd).tolist() == [0] + [BACKGROUND] * 4
    shielding = MaxIoUAssigner(**RCNN, ignore_iof_thr=0.5)
    assert shielding.assign(boxes, gts, crowd).tolist() == [0, IGNORED] + [BACKGROUND] * 3
    assert shielding.assign(boxes, NONE, crowd).tolist() == [IGNORED] * 2 + [BACKGROUND] * 3
    assert shielding.assign(boxes, gts, NONE).tolist() == [0] + [BACKGROUND] * 4


def test_thresholds_that_cross() -> None:
    with pytest.raises(ValueError, match=r'neg_iou_thr=0\.6 exceeds pos_iou_thr=0\.5'):
        MaxIoUAssigner(pos_iou_thr=0.5, neg_iou_thr=0.6)
