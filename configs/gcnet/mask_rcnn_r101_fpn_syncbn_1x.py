"""Mask R-CNN, R-101-FPN, no GC block, SyncBN in the backbone, 1x.

Published on COCO val2017: 39.8 box AP, 36.0 mask AP; 5.8 GB, 0.665 s/iter, 9.2 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_r101_fpn_syncbn_1x_20190602-b2a0e2b7.pth
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        depth=101,
        pretrained='torchvision://resnet101',
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False))
