"""detectron2's Mask R-CNN R50-FPN with this project's weights and images, as a peer of the other scripts.

Started by them with the Python of an environment that has detectron2 (``--detectron2``).
"""

from typing import Any

import numpy as np
import torch
from common import Step, serve_other
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from pycocotools import mask as coco_mask
from torch import Tensor
from train_step import training_step

# Those of detectron2's mask_rcnn_R_50_FPN_1x.yaml, but for the weights (strides in the 3x3 convolutions, RGB
# images) and RoIAlign (2 x 2 samples, no half-pixel shift).
POOLER = dict(POOLER_TYPE='ROIAlign', POOLER_SAMPLING_RATIO=2)
SETTINGS = dict(
    BACKBONE=dict(NAME='build_resnet_fpn_backbone'),
    RESNETS=dict(OUT_FEATURES=['res2', 'res3', 'res4', 'res5'], STRIDE_IN_1X1=False),
    FPN=dict(IN_FEATURES=['res2', 'res3', 'res4', 'res5']),
    ANCHOR_GENERATOR=dict(SIZES=[[32], [64], [128], [256], [512]], ASPECT_RATIOS=[[0.5, 1.0, 2.0]]),
    RPN=dict(IN_FEATURES=['p2', 'p3', 'p4', 'p5', 'p6'], PRE_NMS_TOPK_TRAIN=2000, PRE_NMS_TOPK_TEST=1000,
             POST_NMS_TOPK_TRAIN=1000, POST_NMS_TOPK_TEST=1000),
    ROI_HEADS=dict(NAME='StandardROIHeads', IN_FEATURES=['p2', 'p3', 'p4', 'p5']),
    ROI_BOX_HEAD=dict(NAME='FastRCNNConvFCHead', NUM_FC=2, POOLER_RESOLUTION=7, **POOLER),
    ROI_MASK_HEAD=dict(NAME='MaskRCNNConvUpsampleHead', NUM_CONV=4, POOLER_RESOLUTION=14, **POOLER),
    PIXEL_MEAN=[123.675, 116.28, 103.53],
    PIXEL_STD=[58.395, 57.12, 57.375],
    MASK_ON=True,
    DEVICE='cpu')
# Parts of this project's names, replaced one after the other.
NAMES = {
    'backbone.bn1': 'backbone.bottom_up.stem.conv1.norm', 'backbone.conv1': 'backbone.bottom_up.stem.conv1',
    **{f'backbone.layer{i}': f'backbone.bottom_up.res{i + 1}' for i in range(1, 5)},
    **{f'.bn{i}': f'.conv{i}.norm' for i in range(1, 4)},
    'downsample.0': 'shortcut', 'downsample.1': 'shortcut.norm',
    **{f'neck.lateral_convs.{i}.conv': f'backbone.fpn_lateral{i + 2}' for i in range(4)},
    **{f'neck.fpn_convs.{i}.conv': f'backbone.fpn_output{i + 2}' for i in range(4)},
    'rpn_head.rpn_conv': 'proposal_generator.rpn_head.conv',
    'rpn_head.rpn_cls': 'proposal_generator.rpn_head.objectness_logits',
    'rpn_head.rpn_reg': 'proposal_generator.rpn_head.anchor_deltas',
    'roi_head.bbox_head.shared_fcs.0': 'roi_heads.box_head.fc1',
    'roi_head.bbox_head.shared_fcs.1': 'roi_heads.box_head.fc2',
    'roi_head.bbox_head.fc_cls': 'roi_heads.box_predictor.cls_score',
    'roi_head.bbox_head.fc_reg': 'roi_heads.box_predictor.bbox_pred',
    **{f'roi_head.mask_head.convs.{i}.conv': f'roi_heads.mask_head.mask_fcn{i + 1}' for i in range(4)},
    'roi_head.mask_head.upsample': 'roi_heads.mask_head.deconv',
    'roi_head.mask_head.conv_logits': 'roi_heads.mask_head.predictor'}


def build(exchange: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The detector and its batch; masks to train on are bitmaps."""
    cfg = get_cfg()
    cfg.MODEL.merge_from_other_cfg(CfgNode(SETTINGS))
    model = build_model(cfg)
    state = {}
    for name, value in exchange['state'].items():
        if not name.endswith('num_batches_tracked'):
            for old, new in NAMES.items():
                name = name.replace(old, new)
            state[name] = value
    model.load_state_dict(state)
    batch = []
    for image, sample in zip(exchange['inputs'], exchange['samples']):
        height, width = sample['ori_shape']
        item = dict(image=image.flip(0), height=height, width=width, scale=sample['scale_factor'])
        if 'masks' in sample:
            item['instances'] = Instances(
                tuple(sample['img_shape']), gt_boxes=Boxes(sample['boxes']), gt_classes=sample['labels'],
                gt_masks=BitMasks(sample['masks']))
        batch.append(item)
    return model, batch


def inference(model: Any, batch: list[dict[str, Any]], autocast: torch.autocast) -> Step:
    model.eval()

    @torch.no_grad()
    def step() -> Any:
        with autocast:
            results = [result['instances'].to('cpu') for result in model(batch)]
        for found in results:
            coco_mask.encode(np.asfortranarray(found.pred_masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        return [dict(boxes=(found.pred_boxes.tensor * torch.tensor(item['scale']).repeat(2)).tolist(),
                     scores=found.scores.tolist(), labels=found.pred_classes.tolist())
                for found, item in zip(results, batch)]
    return step


def training(model: Any, batch: list[dict[str, Any]], autocast: torch.autocast) -> Step:
    def losses() -> dict[str, Tensor]:
        with autocast, EventStorage():
            return model(batch)
    return training_step(model, losses, dict(momentum=0.9, weight_decay=1e-4))


if __name__ == '__main__':
    serve_other(build, dict(test=inference, train=training))
