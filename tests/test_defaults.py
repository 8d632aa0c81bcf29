"""Defaults of arguments that configs and callers leave out: those of mmdetection, mmcv and PyTorch."""
import inspect
from collections.abc import Callable

import pytest

from mmdet.datasets.transforms import RandomFlip
from mmdet.models.data_preprocessor import DetDataPreprocessor
from mmdet.models.losses import SmoothL1Loss
from mmdet.models.task_modules.assigner import MaxIoUAssigner
from mmdet.ops import context_transform, multilevel_roi_align, soft_nms
from mmdet.visualization import draw_detections


@pytest.mark.parametrize('function, expected', [
    (SmoothL1Loss, dict(beta=1.0)),
    (MaxIoUAssigner, dict(min_pos_iou=0.0)),
    (DetDataPreprocessor, dict(bgr_to_rgb=True)),  # as all of its configs say
    (RandomFlip, dict(prob=0.5)),
    (multilevel_roi_align, dict(finest_scale=56)),
    (context_transform, dict(eps=1e-5)),
    (soft_nms, dict(iou_threshold=0.3, sigma=0.5, min_score=1e-3, method='linear')),
    (draw_detections, dict(score_thr=0.3)),
])
def test_defaults(function: Callable, expected: dict[str, object]) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in expected} == expected
