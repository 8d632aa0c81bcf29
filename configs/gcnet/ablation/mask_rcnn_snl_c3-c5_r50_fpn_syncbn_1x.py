"""Mask R-CNN, R-50-FPN, simplified non-local block in c3-c5, SyncBN, 1x.

Ablation of the bottleneck (arXiv 1904.11492, table 4d): without, one 1x1 convolution as the transform.
"""
_base_ = [
    '../../_base_/models/mask_rcnn_r50_fpn.py',
    '../../_base_/datasets/coco_instance.py',
    '../../_base_/schedules/schedule_1x.py',
    '../../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False,
        gcb=dict(type='SNL'),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
