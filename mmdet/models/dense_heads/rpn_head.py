"""Region proposal network (Faster R-CNN, arXiv 1506.01497, section 3.1).

``N`` images, ``L`` levels, ``A`` anchors a cell, ``T`` anchors of all levels together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.conv import blocked, conv_relu, dense
from mmdet.models.task_modules.anchor_generator import grid_cells
from mmdet.models.task_modules.assigner import IGNORED
from mmdet.models.train_test_cfg import ProposalConfig, RPNTrainConfig
from mmdet.ops import batched_nms, multilevel_roi_align
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.boxes import Proposals, per_image, tensor_like
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
        hidden = [conv_relu(self.rpn_conv, blocked(x)) for x in features]
        logits, deltas = (
            [dense(conv_relu(conv, x, relu=False)) for x in hidden] for conv in (self.rpn_cls, self.rpn_reg))
        return logits, deltas

    def loss(
        self, features: list[Tensor], samples: list[DataSample], proposal_cfg: ProposalConfig
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """Proposals to train the RoI head on, without gradient, and ``loss_rpn_cls``, ``loss_rpn_bbox``.

        ``features`` are levels (N, C, H_i, W_i), as in :meth:`forward`.
        """
        with torch.no_grad():
            proposals = self.predict(features, samples, proposal_cfg)
        # Targets are float32 in a model of any dtype: which boxes tie must not depend on it.
        anchors = torch.cat(self.anchor_generator.grid_anchors(features, torch.float32))
        valid = self.anchor_generator.valid_flags(features, [s.pad_shape for s in samples])
        assigned = [self._assign(anchors, v, s) for v, s in zip(valid, samples)]
        positives, negatives, objects = [], [], []
        for i, (positive, negative) in enumerate(self.sampler.sample(assigned)):
            positives.append(torch.stack([torch.full_like(positive, i), positive]))
            negatives.append(torch.stack([torch.full_like(negative, i), negative]))
            objects.append(samples[i].boxes[assigned[i][positive]])
        image, anchor = torch.cat(positives + negatives, dim=1)
        logits, deltas = self._forward_at(features, image, anchor)
        num_positives = sum(p.shape[1] for p in positives)
        num_samples = sum(max(p.shape[1], 1) for p in positives + negatives)
        is_positive = torch.arange(len(logits), device=logits.device) < num_positives
        targets = self.bbox_coder.encode(anchors[anchor[:num_positives]], torch.cat(objects))
        return proposals, dict(
            loss_rpn_cls=self.loss_cls(logits, is_positive, num_samples),
            loss_rpn_bbox=self.loss_bbox(deltas[:num_positives], targets, num_samples))

    def _forward_at(self, features: list[Tensor], image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` gives for S anchors (S,) of images (S,): logits (S,) and deltas (S, 4).

        A loss concerns a few hundred of some 100,000 anchors, but the gradient of a convolution of whole maps
        would cost as much as that of all.
        """
        corners = [grid_cells(level, torch.float32) for level in features]
        levels = [torch.full((len(c),), i, device=c.device) for i, c in enumerate(corners)]
        num_anchors = self.anchor_generator.num_anchors
        cell, kind = anchor // num_anchors, anchor % num_anchors
        # RoIAlign of three by three cells with one sample in the middle of each gives them as they are.
        corner = torch.cat(corners)[cell]
        patches = multilevel_roi_align(
            [F.pad(level, (1, 1, 1, 1)) for level in features],
            torch.cat([image[:, None], corner, corner + 3], dim=1), output_size=3,
            spatial_scales=[1.0] * len(features), sampling_ratio=1, levels=torch.cat(levels)[cell])
        hidden = F.relu(_linear(patches, self.rpn_conv), inplace=True)
        logits, deltas = _linear(hidden, self.rpn_cls), _linear(hidden, self.rpn_reg).unflatten(1, (-1, 4))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        row = torch.arange(len(kind), device=kind.device)
        return logits[row, kind].to(dtype), deltas[row, kind].to(dtype)

    def predict(
        self, features: list[Tensor], samples: list[DataSample], proposal_cfg: ProposalConfig
    ) -> list[Proposals]:
        """Proposals of each image from levels (N, C, H_i, W_i)."""
        cls_maps, reg_maps = self(features)
        return self._propose(features, _flatten(cls_maps, 1), _flatten(reg_maps, 4), samples, proposal_cfg)

    def _assign(self, anchors: Tensor, valid: Tensor, sample: DataSample) -> Tensor:
        """The object of each anchor of an image, BACKGROUND or IGNORED: (T,) int64."""
        if self.allowed_border >= 0:
            height, width = sample.img_shape
            border = self.allowed_border
            valid = (
                valid & (anchors[:, :2] >= -border).all(dim=1)
                & (anchors[:, 2] < width + border) & (anchors[:, 3] < height + border))
        # An invalid anchor overlaps nothing, lest it be the best of an object near the border.
        assigned = self.assigner.assign(
            torch.where(valid[:, None], anchors, 0), sample.boxes, sample.ignored_boxes)
        return torch.where(valid, assigned, IGNORED)

    def _propose(
        self,
        features: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        samples: list[DataSample],
        cfg: ProposalConfig,
    ) -> list[Proposals]:
        level_anchors = self.anchor_generator.grid_anchors(features, logits[0].dtype)
        anchors, best_deltas, scores, groups = [], [], [], []
        image = torch.arange(len(samples), device=logits[0].device)
        for level, level_logits in enumerate(logits):
            # Ranked by logit: the sigmoid of large logits ties in float32.
            number = level_logits.shape[1]
            if cfg['nms_pre'] > 0:
                number = min(number, cfg['nms_pre'])
            best, index = level_logits[..., 0].topk(number)
            anchors.append(level_anchors[level][index])
            best_deltas.append(deltas[level].take_along_dim(index[..., None], dim=1))
            scores.append(best)
            groups.append((image[:, None] * len(logits) + level).expand_as(index))
        all_anchors = torch.cat(anchors, dim=1)
        shapes = tensor_like([s.img_shape for s in samples], all_anchors)[:, None]
        boxes = self.bbox_coder.decode(all_anchors, torch.cat(best_deltas, dim=1), shapes)
        large = ((boxes[..., 2:] - boxes[..., :2]) > cfg['min_bbox_size']).all(dim=2)
        # NMS keeps no NaN. To take the small ones out before would make a GPU wait.
        ranks = torch.cat(scores, dim=1).where(large, torch.nan).flatten()
        boxes, group = boxes.flatten(0, 1), torch.cat(groups, dim=1).flatten()
        keep = batched_nms(boxes, ranks, group, cfg['nms']['iou_threshold'])
        kept = per_image(keep, group[keep] // len(logits), len(samples), cfg['max_per_img'])
        return [Proposals(boxes[k], ranks[k].sigmoid()) for k in kept]


def _linear(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution (S, O) of patches (S, C, k, k) of its kernel's size."""
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)


def _flatten(maps: list[Tensor], channels: int) -> list[Tensor]:
    """(N, A * channels, H, W) of each level to (N, H * W * A, channels), at least float32."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    return [m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, channels).to(dtype) for m in maps]
