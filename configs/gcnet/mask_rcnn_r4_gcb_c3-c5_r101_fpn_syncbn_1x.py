"""Mask R-CNN, R-101-FPN, GC block (ratio 1/4) in c3-c5, SyncBN in the backbone, 1x.

Published on COCO val2017: 41.7 box AP, 37.6 mask AP; 7.1 GB, 0.786 s/iter, 8.9 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_r4_gcb_c3-c5_r101_fpn_syncbn_1x_20190602-a893c718.pth
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
        norm_eval=False,
        gcb=dict(ratio=1 / 4),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
