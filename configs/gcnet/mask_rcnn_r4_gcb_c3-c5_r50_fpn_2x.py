"""Mask R-CNN, R-50-FPN, GC block (ratio 1/4) in c3-c5, fixed BN, 2x.

Published on COCO val2017: 40.0 box AP, 36.2 mask AP.
Checkpoint: https://1drv.ms/u/s!AkEXj14LxwVpfllzv_nSW9WnDQ8?e=OzaGaL
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_2x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        gcb=dict(ratio=1 / 4),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
