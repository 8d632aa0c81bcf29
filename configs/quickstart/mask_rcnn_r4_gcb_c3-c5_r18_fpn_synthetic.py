"""Mask R-CNN, R-18-FPN, GC block (ratio 1/4) in c3-c5: small enough to train from scratch on a CPU.

For two processes with 4 images each: 405 iterations of about 0.8 s on two CPU cores.
"""

_base_ = [
    '../_base_/models/mask_rcnn_r50_fpn.py',
    '../_base_/datasets/synthetic_instance.py',
    '../_base_/default_runtime.py',
]
norm_cfg = dict(type='SyncBN')  # of 4 images alone the statistics are noisy
model = dict(
    backbone=dict(
        depth=18,
        norm_cfg=norm_cfg,
        gcb=dict(ratio=1 / 4),
        stage_with_gcb=(False, True, True, True),
        frozen_stages=-1,
        norm_eval=False,
        pretrained=None),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        # Objects have 14 to 118 pixels: RoIs below 32 come from stride 4, below 64 from stride 8.
        bbox_roi_extractor=dict(out_channels=64, finest_scale=16, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=12),
        mask_roi_extractor=dict(out_channels=64, finest_scale=16, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=12, norm_cfg=norm_cfg)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(max_per_img=30)))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=3, T_max=3, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=8)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))
