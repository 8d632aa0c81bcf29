"""Mask R-CNN, R-50-FPN, SE block (ratio 1/16) in c3-c5, SyncBN, 1x.

Ablation of pooling and fusion, beyond table 4f of arXiv 1904.11492: the SE block itself, without layer norm.
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
        gcb=dict(type='SE', ratio=1 / 16),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
