"""The second stage of Cascade R-CNN (arXiv 1712.00726), with masks (arXiv 1906.09756)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet.models.roi_heads.stage import mask_loss, results_of, sample_rois
from mmdet.models.train_test_cfg import RCNNTestConfig, RCNNTrainConfig
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.boxes import Proposals, boxes_to_rois
from mmdet.structures.data_sample import DataSample


@MODELS.register_module()
class CascadeRoIHead(nn.Module):
    """Stages of box heads, each of which trains on, and refines, the boxes of the one before.

    Args:
        stage_loss_weights: factor of each stage's losses.
        bbox_head: config of each stage's head.
        train_cfg: the detector's ``train_cfg.rcnn``, one a stage.
        bbox_roi_extractor, mask_roi_extractor, mask_head, test_cfg: common to the stages; each has
            a mask head of its own.
    """

    def __init__(
        self,
        stage_loss_weights: Sequence[float],
        bbox_roi_extractor: dict[str, Any],
        bbox_head: list[dict[str, Any]],
        train_cfg: list[RCNNTrainConfig],
        test_cfg: RCNNTestConfig,
        mask_roi_extractor: dict[str, Any] | None = None,
        mask_head: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        stages = len(stage_loss_weights)
        if not stages == len(bbox_head) == len(train_cfg):
            raise ValueError(
                f'roi_head has {stages} stage_loss_weights, {len(bbox_head)} bbox_head and {len(train_cfg)} '
                'train_cfg.rcnn; give as many of each')
        self.stage_loss_weights = stage_loss_weights
        self.bbox_roi_extractor = MODELS.build(bbox_roi_extractor)
        self.bbox_head = nn.ModuleList(MODELS.build(head) for head in bbox_head)
        self.mask_roi_extractor = MODELS.build(mask_roi_extractor) if mask_roi_extractor else None
        self.mask_head = nn.ModuleList(MODELS.build(mask_head) for _ in range(stages)) if mask_head else None
        self.assigners = [TASK_UTILS.build(cfg['assigner']) for cfg in train_cfg]
        self.samplers = [TASK_UTILS.build(cfg['sampler']) for cfg in train_cfg]
        self.mask_sizes = [cfg.get('mask_size', 28) for cfg in train_cfg]
        self.test_cfg = test_cfg

    def loss(
        self, features: list[Tensor], proposals: list[Proposals], samples: list[DataSample]
    ) -> dict[str, Tensor]:
        """The losses of :class:`StandardRoIHead` a stage, as ``s0.loss_cls`` and so on."""
        losses: dict[str, Tensor] = {}
        boxes = [p.boxes for p in proposals]
        for i, weight in enumerate(self.stage_loss_weights):
            head: Any = self.bbox_head[i]
            sampled = sample_rois(boxes, samples, self.assigners[i], self.samplers[i], head.num_classes)
            rois = boxes_to_rois([s.boxes for s in sampled])
            logits, deltas = head(self.bbox_roi_extractor(features, rois))
            stage = head.loss(logits, deltas, sampled, samples)
            if self.mask_head is not None:
                stage |= mask_loss(
                    features, sampled, samples, self.mask_roi_extractor, self.mask_head[i],
                    self.mask_sizes[i])
            losses |= {f's{i}.{k}': v * weight if 'loss' in k else v for k, v in stage.items()}
            if i + 1 < len(self.bbox_head):
                with torch.no_grad():
                    labels = torch.cat([s.labels for s in sampled])
                    refined = head.refine(logits, deltas, rois, labels, samples)
                # The objects themselves are left out: the next stage adds them anew.
                boxes = [
                    part[~s.is_object]
                    for part, s in zip(refined.split([len(s.boxes) for s in sampled]), sampled)]
        return losses

    def predict(
        self, features: list[Tensor], proposals: list[Proposals], samples: list[DataSample]
    ) -> list[dict[str, Any]]:
        """Those of :class:`StandardRoIHead`: the last stage's boxes, with the mean of all stages' logits."""
        rois = boxes_to_rois([p.boxes for p in proposals])
        all_logits = []
        for i, stage in enumerate(self.bbox_head):
            head: Any = stage
            logits, deltas = head(self.bbox_roi_extractor(features, rois))
            all_logits.append(logits)
            if i + 1 < len(self.bbox_head):
                background = torch.full((len(rois),), head.num_classes, device=rois.device)
                boxes = head.refine(logits, deltas, rois, background, samples)
                rois = torch.cat([rois[:, :1], boxes], dim=1)
        scores = torch.stack(all_logits).mean(dim=0).softmax(dim=1)
        detections = head.predict(scores, deltas, rois, samples, self.test_cfg)
        mask_heads = list(self.mask_head) if self.mask_head is not None else []
        return results_of(
            features, detections, samples, self.mask_roi_extractor, mask_heads, self.test_cfg)
