from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor

from mmdet.structures.boxes import box_area, box_iof, box_iou, boxes_to_rois, clip_boxes, per_image


def random_boxes(number: int) -> Tensor:
    corner = torch.rand(number, 2, dtype=torch.float64) * 100
    return torch.cat([corner, corner + torch.rand(number, 2, dtype=torch.float64) * 50 + 1], dim=1)


def test_area_and_iou_are_torchvisions() -> None:
    a, b = random_boxes(40), random_boxes(30)
    b[:5] = a[:5]
    torch.testing.assert_close(box_area(a), torchvision.ops.box_area(a), rtol=0, atol=1e-12)
    torch.testing.assert_close(box_iou(a, b), torchvision.ops.box_iou(a, b), rtol=0, atol=1e-14)
    assert (box_iou(a, b).diagonal()[:5] == 1).all()


def test_iou_and_iof_by_hand() -> None:
    a = torch.tensor([[0., 0., 10., 10.], [20., 0., 30., 10.]])
    b = torch.tensor([[5., 0., 25., 10.]])  # continuous: 5 x 10 of each lies inside
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[50 / 250], [50 / 250]]))
    torch.testing.assert_close(box_iof(a, b), torch.tensor([[0.5], [0.5]]))
    torch.testing.assert_close(box_iof(b, a), torch.tensor([[0.25, 0.25]]))


@pytest.mark.parametrize('overlap', [box_iou, box_iof])
def test_a_box_below_a_pixel_overlaps_itself_wholly(overlap: Callable) -> None:
    box = torch.tensor([[3., 3., 3.5, 3.5]])
    assert overlap(box, box).item() == 1


def test_boxes_that_touch_do_not_overlap() -> None:
    assert box_iou(torch.tensor([[0., 0., 1., 1.]]), torch.tensor([[1., 0., 2., 1.]])).item() == 0


def test_boxes_without_area_overlap_nothing() -> None:
    point = torch.tensor([[3., 3., 3., 3.]])
    assert box_iou(point, point).item() == 0
    assert box_iof(point, torch.tensor([[0., 0., 9., 9.]])).item() == 0


@pytest.mark.parametrize('sizes', [(0, 3), (3, 0), (0, 0)])
def test_no_boxes(sizes: tuple[int, int]) -> None:
    a, b = random_boxes(sizes[0]), random_boxes(sizes[1])
    assert box_iou(a, b).shape == box_iof(a, b).shape == sizes


def test_clip_is_torchvisions() -> None:
    boxes = random_boxes(50) * 2 - 60
    torch.testing.assert_close(
        clip_boxes(boxes, (70, 90)), torchvision.ops.clip_boxes_to_image(boxes, (70, 90)), rtol=0, atol=0)
    assert clip_boxes(boxes.view(5, 10, 4), (70, 90)).shape == (5, 10, 4)


@pytest.mark.parametrize('most, expected', [
    (-1, [[7, 5, 3], [], [6, 4]]), (2, [[7, 5], [], [6, 4]]), (0, [[], [], []])])
def test_the_first_of_each_image(most: int, expected: list[list[int]]) -> None:
    keep, images = torch.tensor([7, 6, 5, 4, 3]), torch.tensor([0, 2, 0, 2, 0])
    assert [kept.tolist() for kept in per_image(keep, images, 3, most)] == expected


def test_rois_carry_the_image() -> None:
    boxes = [random_boxes(2), random_boxes(0), random_boxes(1)]
    rois = boxes_to_rois(boxes)
    assert rois[:, 0].tolist() == [0, 0, 2]
    torch.testing.assert_close(rois[:, 1:], torch.cat(boxes))
