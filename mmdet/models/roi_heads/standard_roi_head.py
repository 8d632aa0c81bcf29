"""The second stage of Faster R-CNN and Mask R-CNN."""

from typing import Any

from torch import Tensor, nn

from mmdet.models.roi_heads.stage import mask_loss, results_of, sample_rois
from mmdet.models.train_test_cfg import RCNNTestConfig, RCNNTrainConfig
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.boxes import Proposals, boxes_to_rois
from mmdet.structures.data_sample import DataSample


@MODELS.register_module()
class StandardRoIHead(nn.Module):
    """One box head, and a mask head if given.

    Args:
        bbox_roi_extractor, bbox_head, mask_roi_extractor, mask_head: configs of the parts;
            no mask head makes it Faster R-CNN.
        train_cfg, test_cfg: the detector's ``train_cfg.rcnn`` and ``test_cfg.rcnn``.
    """

    def __init__(
        self,
        bbox_roi_extractor: dict[str, Any],
        bbox_head: dict[str, Any],
        train_cfg: RCNNTrainConfig,
        test_cfg: RCNNTestConfig,
        mask_roi_extractor: dict[str, Any] | None = None,
        mask_head: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.bbox_roi_extractor = MODELS.build(bbox_roi_extractor)
        self.bbox_head = MODELS.build(bbox_head)
        self.mask_roi_extractor = MODELS.build(mask_roi_extractor) if mask_roi_extractor else None
        self.mask_head = MODELS.build(mask_head) if mask_head else None
        self.assigner = TASK_UTILS.build(train_cfg['assigner'])
        self.sampler = TASK_UTILS.build(train_cfg['sampler'])
        self.mask_size = train_cfg.get('mask_size', 28)
        self.test_cfg = test_cfg

    def loss(
        self, features: list[Tensor], proposals: list[Proposals], samples: list[DataSample]
    ) -> dict[str, Tensor]:
        """``loss_cls``, ``loss_bbox``, ``acc`` and, with a mask head, ``loss_mask``.

        ``features`` are levels (N, C, H_i, W_i).
        """
        sampled = sample_rois(
            [p.boxes for p in proposals], samples, self.assigner, self.sampler, self.bbox_head.num_classes)
        logits, deltas = self.bbox_head(
            self.bbox_roi_extractor(features, boxes_to_rois([s.boxes for s in sampled])))
        losses = self.bbox_head.loss(logits, deltas, sampled, samples)
        if self.mask_head is not None:
            losses |= mask_loss(
                features, sampled, samples, self.mask_roi_extractor, self.mask_head, self.mask_size)
        return losses

    def predict(
        self, features: list[Tensor], proposals: list[Proposals], samples: list[DataSample]
    ) -> list[dict[str, Any]]:
        """Detections of each image in pixels of the original, from levels (N, C, H_i, W_i).

        They are ``boxes`` (n, 4), ``scores`` and ``labels`` (n,), and n ``masks`` (COCO RLE).
        """
        rois = boxes_to_rois([p.boxes for p in proposals])
        logits, deltas = self.bbox_head(self.bbox_roi_extractor(features, rois))
        detections = self.bbox_head.predict(logits.softmax(dim=1), deltas, rois, samples, self.test_cfg)
        mask_heads = [self.mask_head] if self.mask_head is not None else []
        return results_of(
            features, detections, samples, self.mask_roi_extractor, mask_heads, self.test_cfg)
