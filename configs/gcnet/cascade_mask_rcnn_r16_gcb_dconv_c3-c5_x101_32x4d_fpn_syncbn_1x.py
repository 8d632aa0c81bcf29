"""Cascade Mask R-CNN, X-101-32x4d-FPN, DCN and GC block (ratio 1/16) in c3-c5, SyncBN in the backbone, 1x.

Published on COCO val2017: 47.9 box AP, 40.9 mask AP.
Checkpoint: https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models/gcnet/cascade_mask_rcnn_r16_gcb_dconv_c3-c5_x101_32x4d_fpn_syncbn_1x_20190602-b86027a6.pth
"""
_base_ = [
    '../_base_/models/cascade_mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        pretrained='open-mmlab://resnext101_32x4d',
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False,
        dcn=dict(type='DCN', deform_groups=1),
        stage_with_dcn=(False, True, True, True),
        gcb=dict(ratio=1 / 16),
        stage_with_gcb=(False, True, True, True)))  # c2, c3, c4, c5
