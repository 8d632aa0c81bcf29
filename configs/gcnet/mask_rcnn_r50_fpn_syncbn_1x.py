"""Mask R-CNN, R-50-FPN, no GC block, SyncBN in the backbone, 1x.

Published on COCO val2017: 37.2 box AP, 33.8 mask AP; 3.9 GB, 0.543 s/iter, 10.2 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_r50_fpn_syncbn_1x_20190602-bccc62fa.pth
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False))
