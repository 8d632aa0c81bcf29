"""Faster R-CNN, R-50-FPN, GC block (ratio 1/4) in c3-c5, fixed BN, 1x."""
_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    type='FasterRCNN',
    backbone=dict(
        gcb=dict(ratio=1 / 4),
        stage_with_gcb=(False, True, True, True)),  # c2, c3, c4, c5
    roi_head=dict(mask_roi_extractor=None, mask_head=None),
    train_cfg=dict(rcnn=dict(assigner=dict(match_low_quality=False))))
