"""Mask R-CNN, X-101-32x4d-FPN, GC block (ratio 1/4) in c3-c5, SyncBN in the backbone, 1x.

Published on COCO val2017: 42.9 box AP, 38.5 mask AP; 8.3 GB, 1.037 s/iter, 7.6 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_r4_gcb_c3-c5_x101_32x4d_fpn_syncbn_1x_20190602-930b3d51.pth
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
        norm_eval=False,
        gcb=dict(ratio=1 / 4),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
