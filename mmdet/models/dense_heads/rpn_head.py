"""Region proposal network (Faster R-CNN, arXiv 1506.01497, section 3.1).

``N`` images, ``L`` levels, ``A`` anchors a cell, ``T`` anchors of all levels together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.train_test_cfg import ProposalConfig, RPNTrainConfig
from mmdet.ops import batched_nms
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.boxes import Proposals
from mmdet.structures.data_sample import DataSample


@MODELS.register_module()
class RPNHead(nn.Module):
    """A 3x3 convolution, then objectness and box deltas of each anchor.

    Args:
        in_channels, feat_channels: of the pyramid and of the hidden layer.
        anchor_generator, bbox_coder, loss_cls, loss_bbox: configs of the parts.
        train_cfg: the detector's ``train_cfg.rpn``.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: int,
        anchor_generator: dict[str, Any],
        bbox_coder: dict[str, Any],
        loss_cls: dict[str, Any],
        loss_bbox: dict[str, Any],
        train_cfg: RPNTrainConfig,
    ) -> None:
        super().__init__()
        self.anchor_generator = TASK_UTILS.build(anchor_generator)
        self.bbox_coder = TASK_UTILS.build(bbox_coder)
        self.loss_cls = MODELS.build(loss_cls)
        self.loss_bbox = MODELS.build(loss_bbox)
        self.assigner = TASK_UTILS.build(train_cfg['assigner'])
        self.sampler = TASK_UTILS.build(train_cfg['sampler'])
        self.allowed_border = train_cfg.get('allowed_border', -1)

        num_anchors = self.anchor_generator.num_anchors
        self.rpn_conv = nn.Conv2d(in_channels, feat_channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(feat_channels, num_anchors, 1)
        self.rpn_reg = nn.Conv2d(feat_channels, num_anchors * 4, 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels (N, C, H_i, W_i) to objectness logits (N, A, H_i, W_i) and deltas (N, 4 * A, H_i, W_i)."""
        hidden = [F.relu(self.rpn_conv(x), inplace=True) for x in features]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]

    def loss(
        self, features: list[Tensor], samples: list[DataSample], proposal_cfg: ProposalConfig
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """Proposals to train the RoI head on, without gradient, and ``loss_rpn_cls``, ``loss_rpn_bbox``."""
        cls_maps, reg_maps = self(features)
        logits, deltas = _flatten(cls_maps, 1), _flatten(reg_maps, 4)
        all_logits, all_deltas = torch.cat(logits, 1)[..., 0], torch.cat(deltas, 1)
        # Targets are float32 in a model of any dtype: which boxes tie must not depend on it.
        all_anchors = torch.cat(self.anchor_generator.grid_anchors(cls_maps, torch.float32))

        pred_logits, targets, pred_deltas, target_deltas = [], [], [], []
        num_samples = 0
        for i, sample in enumerate(samples):
            valid = self.anchor_generator.valid_flags(cls_maps, sample.pad_shape)
            positive, negative, matched = self._sample_anchors(all_anchors, valid, sample)
            chosen = torch.cat([positive, negative])
            pred_logits.append(all_logits[i, chosen])
            targets.append(torch.arange(len(chosen), device=chosen.device) < len(positive))
            pred_deltas.append(all_deltas[i, positive])
            target_deltas.append(self.bbox_coder.encode(all_anchors[positive], sample.boxes[matched]))
            num_samples += max(len(positive), 1) + max(len(negative), 1)
        losses = dict(
            loss_rpn_cls=self.loss_cls(torch.cat(pred_logits), torch.cat(targets), num_samples),
            loss_rpn_bbox=self.loss_bbox(torch.cat(pred_deltas), torch.cat(target_deltas), num_samples))
        with torch.no_grad():
            proposals = self._propose(cls_maps, logits, deltas, samples, proposal_cfg)
        return proposals, losses

    def predict(
        self, features: list[Tensor], samples: list[DataSample], proposal_cfg: ProposalConfig
    ) -> list[Proposals]:
        """Proposals of each image."""
        cls_maps, reg_maps = self(features)
        return self._propose(cls_maps, _flatten(cls_maps, 1), _flatten(reg_maps, 4), samples, proposal_cfg)

    def _sample_anchors(
        self, anchors: Tensor, valid: Tensor, sample: DataSample
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of positive (P,) and negative (M,) anchors, and the object (P,) of each positive."""
        if self.allowed_border >= 0:
            height, width = sample.img_shape
            border = self.allowed_border
            valid = (
                valid & (anchors[:, :2] >= -border).all(dim=1)
                & (anchors[:, 2] < width + border) & (anchors[:, 3] < height + border))
        # Only among these is an anchor an object's best: one near the border keeps a positive.
        index = valid.nonzero()[:, 0]
        assigned = self.assigner.assign(anchors[index], sample.boxes, sample.ignored_boxes)
        positive, negative = self.sampler.sample(assigned)
        return index[positive], index[negative], assigned[positive]

    def _propose(
        self,
        cls_maps: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        samples: list[DataSample],
        cfg: ProposalConfig,
    ) -> list[Proposals]:
        anchors = self.anchor_generator.grid_anchors(cls_maps, logits[0].dtype)
        proposals = []
        for i, sample in enumerate(samples):
            boxes, scores, levels = [], [], []
            for level, (level_anchors, level_logits, level_deltas) in enumerate(zip(anchors, logits, deltas)):
                # Ranked by logit: the sigmoid of large logits ties in float32.
                best, index = level_logits[i, :, 0].topk(min(cfg['nms_pre'], len(level_anchors)))
                boxes.append(self.bbox_coder.decode(
                    level_anchors[index], level_deltas[i, index], sample.img_shape))
                scores.append(best)
                levels.append(torch.full_like(index, level))
            all_boxes, all_scores, all_levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
            large = ((all_boxes[:, 2:] - all_boxes[:, :2]) > cfg['min_bbox_size']).all(dim=1)
            all_boxes, all_scores, all_levels = all_boxes[large], all_scores[large], all_levels[large]
            keep = batched_nms(all_boxes, all_scores, all_levels, cfg['nms']['iou_threshold'])
            keep = keep[:cfg['max_per_img']]
            proposals.append(Proposals(all_boxes[keep], all_scores[keep].sigmoid()))
        return proposals


def _flatten(maps: list[Tensor], channels: int) -> list[Tensor]:
    """(N, A * channels, H, W) of each level to (N, H * W * A, channels), at least float32."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    return [m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, channels).to(dtype) for m in maps]
