"""Mask R-CNN, R-50-FPN, no GC block, fixed BN, 1x.

Published on COCO val2017: 37.3 box AP, 34.2 mask AP; 3.9 GB, 0.453 s/iter, 10.6 fps.
Checkpoint: https://1drv.ms/u/s!AkEXj14LxwVpffUWWM4A0tFYYCk?e=IM6zgo
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
