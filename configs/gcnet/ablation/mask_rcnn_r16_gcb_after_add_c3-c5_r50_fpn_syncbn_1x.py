"""Mask R-CNN, R-50-FPN, GC block (ratio 1/16) after the addition in c3-c5, SyncBN, 1x.

Ablation of the position (arXiv 1904.11492, table 4b): afterAdd.
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
        gcb=dict(ratio=1 / 16, position='after_add'),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
