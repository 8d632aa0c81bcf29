"""Mask R-CNN, X-101-32x4d-FPN, no GC block, SyncBN in the backbone, 1x.

Published on COCO val2017: 41.2 box AP, 37.3 mask AP; 7.1 GB, 0.912 s/iter, 8.5 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_x101_32x4d_fpn_syncbn_1x_20190602-bb8ae7e5.pth
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        pretrained='open-mmlab://resnext101_32x4d',
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False))
