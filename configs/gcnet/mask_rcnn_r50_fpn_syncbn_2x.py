"""Mask R-CNN, R-50-FPN, no GC block, SyncBN in the backbone, 2x.

Published on COCO val2017: 37.7 box AP, 34.3 mask AP; 3.9 GB, 0.543 s/iter, 10.2 fps.
Checkpoint: https://1drv.ms/u/s!AkEXj14LxwVpgQART6Djedy3UeL7?e=MvalDU
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_2x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False))
