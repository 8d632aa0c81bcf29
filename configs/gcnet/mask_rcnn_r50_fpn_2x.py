"""Mask R-CNN, R-50-FPN, no GC block, fixed BN, 2x.

Published on COCO val2017: 38.2 box AP, 34.9 mask AP.
Checkpoint: https://1drv.ms/u/s!AkEXj14LxwVpf7epsyY_qoEN9Eg?e=CqN9yI
"""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_2x.py',
    '../_base_/default_runtime.py',
]
