"""Which object each anchor or proposal stands for, by overlap."""

import torch
from torch import Tensor

from mmdet.registry import TASK_UTILS
from mmdet.structures.boxes import box_iof, box_iou

BACKGROUND = -1
IGNORED = -2


@TASK_UTILS.register_module()
class MaxIoUAssigner:
    """A box is positive for the object it overlaps most, if enough (Faster R-CNN, section 3.1.2).

    Args:
        pos_iou_thr: from this overlap on a box is positive.
        neg_iou_thr: below it the box is background; between the two it is ignored.
        min_pos_iou: an object keeps its best boxes as positives from this overlap on,
            with ``match_low_quality``.
        match_low_quality: let objects keep their best boxes below ``pos_iou_thr``.
        ignore_iof_thr: background boxes with more than this share of their area in an ignored
            (crowd) region are ignored too; -1 treats those regions as background.
    """

    def __init__(
        self,
        pos_iou_thr: float,
        neg_iou_thr: float,
        min_pos_iou: float = 0.0,
        match_low_quality: bool = True,
        ignore_iof_thr: float = -1,
    ) -> None:
        if neg_iou_thr > pos_iou_thr:
            raise ValueError(f'MaxIoUAssigner: neg_iou_thr={neg_iou_thr} exceeds pos_iou_thr={pos_iou_thr}')
        self.pos_iou_thr = pos_iou_thr
        self.neg_iou_thr = neg_iou_thr
        self.min_pos_iou = min_pos_iou
        self.match_low_quality = match_low_quality
        self.ignore_iof_thr = ignore_iof_thr

    def assign(self, boxes: Tensor, gt_boxes: Tensor, ignored_boxes: Tensor) -> Tensor:
        """For each of boxes (N, 4) the index into gt_boxes (G, 4), BACKGROUND or IGNORED: (N,) int64."""
        assigned = torch.full((len(boxes),), IGNORED, dtype=torch.int64, device=boxes.device)
        if len(gt_boxes) == 0 or len(boxes) == 0:
            assigned[:] = BACKGROUND
        else:
            overlaps = box_iou(boxes, gt_boxes)
            best_overlap, best_gt = overlaps.max(dim=1)
            assigned[best_overlap < self.neg_iou_thr] = BACKGROUND
            assigned = torch.where(best_overlap >= self.pos_iou_thr, best_gt, assigned)
            if self.match_low_quality:
                # All boxes that tie for an object's best get it; a later object wins over an earlier.
                best_of_gt = overlaps.max(dim=0).values
                is_best = (overlaps == best_of_gt) & (best_of_gt >= self.min_pos_iou)
                order = torch.arange(len(gt_boxes), device=boxes.device)
                last_gt = torch.where(is_best, order, -1).max(dim=1).values
                assigned = torch.where(last_gt >= 0, last_gt, assigned)
        if self.ignore_iof_thr > 0 and len(ignored_boxes) > 0 and len(boxes) > 0:
            shielded = box_iof(boxes, ignored_boxes).max(dim=1).values > self.ignore_iof_thr
            assigned[shielded & (assigned == BACKGROUND)] = IGNORED
        return assigned
