"""Mask R-CNN, R-50-FPN, GC block (ratio 1/16) in c3-c5, fixed BN, 1x.

Published on COCO val2017: 38.5 box AP, 35.1 mask AP; 4.5 GB, 0.533 s/iter, 10.1 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_r16_gcb_c3-c5_r50_fpn_1x_20190602-c550c707.pth
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        gcb=dict(ratio=1 / 16),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
