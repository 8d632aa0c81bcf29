"""Mask R-CNN, R-101-FPN, no GC block, fixed BN, 1x.

Published on COCO val2017: 39.4 box AP, 35.9 mask AP; 5.8 GB, 0.571 s/iter, 9.5 fps.
Checkpoint: https://1drv.ms/u/s!AkEXj14LxwVpcZ9zKY77ptT4l9U?e=Xgm8j3
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
        pretrained='torchvision://resnet101'))
