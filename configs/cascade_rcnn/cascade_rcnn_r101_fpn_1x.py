"""Cascade R-CNN, R-101-FPN, no GC block, fixed BN, 1x."""
_base_ = [
    '../_base_/models/cascade_mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    type='CascadeRCNN',
    backbone=dict(
        depth=101,
        pretrained='torchvision://resnet101'),
    roi_head=dict(mask_roi_extractor=None, mask_head=None))
