"""Mask R-CNN, R-50-FPN, GC block (ratio 1/16) in c3-c5, SyncBN throughout, 4conv1fc box head, 1x.

Published on COCO val2017: 41.0 box AP, 36.5 mask AP.
Checkpoint: https://1drv.ms/u/s!AkEXj14LxwVpgQOpmj-j0ctBAZog?e=q9pu4D
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
norm_cfg = dict(type='SyncBN')
model = dict(
    backbone=dict(
        norm_cfg=norm_cfg,
        norm_eval=False,
        gcb=dict(ratio=1 / 16),
        stage_with_gcb=(False, True, True, True)),  # c2, c3, c4, c5
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(num_shared_convs=4, num_shared_fcs=1, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg)))
