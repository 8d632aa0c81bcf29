"""Mask R-CNN, R-50-FPN, one simplified non-local block in c4, SyncBN, 1x.

Ablation of the block design (arXiv 1904.11492, table 4a): +1 SNL, right before the last residual block of c4.
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
        gcb=dict(type='SNL', position='after_add'),
        stage_with_gcb=(False, False, (-2,), False)))  # c2, c3, c4 (after the last block but one), c5
