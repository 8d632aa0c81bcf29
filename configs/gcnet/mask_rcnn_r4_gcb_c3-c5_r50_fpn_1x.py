"""Mask R-CNN, R-50-FPN, GC block (ratio 1/4) in c3-c5, fixed BN, 1x.

Published on COCO val2017: 38.9 box AP, 35.5 mask AP; 4.6 GB, 0.533 s/iter, 9.9 fps.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x_20190602-18ae2dfd.pth
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        gcb=dict(ratio=1 / 4),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
