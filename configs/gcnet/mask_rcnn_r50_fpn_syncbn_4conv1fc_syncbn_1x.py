"""Mask R-CNN, R-50-FPN, no GC block, SyncBN throughout, 4conv1fc box head, 1x.

Published on COCO val2017: 38.8 box AP, 34.6 mask AP.
Checkpoint: https://1drv.ms/u/s!AkEXj14LxwVpgQTW281dmK9sfiA1?e=xwK5Tw
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
        norm_eval=False),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(num_shared_convs=4, num_shared_fcs=1, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg)))
