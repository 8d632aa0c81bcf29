from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from mmengine.config import Config
from torch import Tensor

from mmdet.registry import MODELS
from mmdet.structures.boxes import Proposals

BOX = [[8., 8., 40., 40.]]
CROWD = [[0., 0., 60., 60.]]


def features(images: int) -> list[Tensor]:
    return [torch.randn(images, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32)]


def proposals(*numbers: int) -> list[Proposals]:
    """So many boxes an image, around BOX and elsewhere."""
    boxes = []
    for number in numbers:
        corner = torch.rand(number, 2) * 50
        boxes.append(torch.cat([corner, corner + 30], dim=1))
    return [Proposals(b, torch.rand(len(b))) for b in boxes]


@pytest.mark.parametrize('objects, numbers', [
    ((BOX, BOX), (20, 30)), ((BOX, []), (20, 30)), (([], []), (20, 30)), ((BOX, []), (0, 0)),
    (([], []), (0, 0))],
    ids=['both', 'one', 'none', 'no proposals', 'nothing at all'])
def test_every_parameter_has_a_finite_gradient(
        build: Callable, make_sample: Callable, objects: tuple, numbers: tuple[int, int]) -> None:
    head = build().roi_head.train()
    samples = [make_sample(boxes, labels=[2] * len(boxes), crowd=CROWD) for boxes in objects]
    losses = head.loss(features(2), proposals(*numbers), samples)
    assert set(losses) == {'loss_cls', 'loss_bbox', 'loss_mask', 'acc'}
    assert all(loss.isfinite() for loss in losses.values())
    if not any(objects):
        assert losses['loss_bbox'] == losses['loss_mask'] == 0
    else:
        assert losses['loss_bbox'] > 0 or not any(numbers)  # the objects themselves need not move
        assert losses['loss_mask'] > 0
    sum(loss for name, loss in losses.items() if 'loss' in name).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize('numbers', [(0, 0), (0, 20), (20, 0)])
def test_images_without_proposals_have_no_detections(
        build: Callable, make_sample: Callable, numbers: tuple[int, int]) -> None:
    head = build('test_cfg.rcnn.score_thr', 0.0).roi_head.eval()
    with torch.no_grad():
        results = head.predict(features(2), proposals(*numbers), [make_sample([]), make_sample([])])
    for result, number in zip(results, numbers, strict=True):
        assert (len(result['boxes']) > 0) == (number > 0)
        assert len(result['boxes']) == len(result['scores']) == len(result['labels']) == len(result['masks'])
        assert result['boxes'].shape[1:] == (4,) and result['labels'].dtype == torch.int64


def test_mask_targets_fit_the_mask_head_by_default(small_cfg: Config, make_sample: Callable) -> None:
    cfg = deepcopy(small_cfg.model)
    del cfg.train_cfg.rcnn['mask_size']
    losses = MODELS.build(cfg).roi_head.loss(features(1), proposals(20), [make_sample(BOX)])
    assert losses['loss_mask'] > 0


def test_the_mask_branch_sees_positives_alone(build: Callable, make_sample: Callable) -> None:
    head = build().roi_head
    seen = []
    head.mask_roi_extractor.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    head.loss(features(2), proposals(20, 30), [make_sample([]), make_sample(BOX)])
    assert seen[0][:, 0].eq(1).all() and seen[0][0].tolist() == [1, *BOX[0]]
    assert 1 <= len(seen[0]) < 16
