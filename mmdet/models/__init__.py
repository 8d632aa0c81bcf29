"""The model families. Importing this fills the registries MODELS and TASK_UTILS."""

from mmdet.models import data_preprocessor, losses, task_modules
from mmdet.models.backbones import resnet
from mmdet.models.dense_heads import rpn_head
from mmdet.models.detectors import two_stage
from mmdet.models.necks import fpn
from mmdet.models.roi_heads import (
    bbox_head,
    cascade_roi_head,
    mask_head,
    roi_extractor,
    standard_roi_head,
)

__all__ = [
    'bbox_head', 'cascade_roi_head', 'data_preprocessor', 'fpn', 'losses', 'mask_head', 'resnet',
    'roi_extractor', 'rpn_head', 'standard_roi_head', 'task_modules', 'two_stage',
]
