"""Mask R-CNN, R-101-FPN, GC block (ratio 1/16) in c3-c5, fixed BN, 1x.

Published on COCO val2017: 40.8 box AP, 37.0 mask AP; 7.0 GB, 0.731 s/iter, 8.6 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_r16_gcb_c3-c5_r101_fpn_1x_20190602-f4456442.pth
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
        gcb=dict(ratio=1 / 16),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
