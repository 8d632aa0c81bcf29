import pytest
import torch

from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import crop_masks


def test_a_moved_sample_is_a_copy() -> None:
    sample = DataSample(img_id=1, img_path='a', ori_shape=(4, 6), img_shape=(8, 12), boxes=torch.ones(2, 4),
                        labels=torch.ones(2, dtype=torch.int64))
    moved = sample.to(torch.device('meta'))
    assert moved.boxes.device.type == moved.labels.device.type == moved.ignored_boxes.device.type == 'meta'
    assert moved.masks is None and moved.img_shape == (8, 12)
    assert sample.boxes.device.type == 'cpu'
    sample.masks = crop_masks(torch.ones(2, 8, 12, dtype=torch.uint8))
    masks = sample.to(torch.device('meta')).masks
    assert masks is not None and masks.pixels.device.type == masks.crops.device.type == 'meta'
    assert sample.masks.pixels.device.type == 'cpu'


@pytest.mark.cuda
def test_a_pinned_sample_is_a_copy() -> None:
    sample = DataSample(img_id=1, img_path='a', ori_shape=(4, 6), img_shape=(8, 12), boxes=torch.ones(2, 4),
                        labels=torch.ones(2, dtype=torch.int64))
    pinned = sample.pin_memory()
    assert pinned.boxes.is_pinned() and pinned.labels.is_pinned()
    assert pinned.masks is None and torch.equal(pinned.boxes, sample.boxes) and not sample.boxes.is_pinned()


def test_a_sample_without_objects_has_empty_tensors_of_its_own() -> None:
    a, b = (DataSample(img_id=i, img_path='', ori_shape=(1, 1), img_shape=(1, 1)) for i in range(2))
    assert a.boxes.shape == a.ignored_boxes.shape == (0, 4)
    assert a.labels.shape == (0,) and a.labels.dtype == torch.int64
    assert a.boxes is not b.boxes
