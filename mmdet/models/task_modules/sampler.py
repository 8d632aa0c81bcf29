"""A random subset of positive and negative boxes to train on."""

import torch
from torch import Tensor

from mmdet.models.task_modules.assigner import BACKGROUND
from mmdet.registry import TASK_UTILS


def random_choice(indices: Tensor, num: int) -> Tensor:
    """``num`` of indices (N,), each equally likely; all of them if there are no more."""
    if len(indices) <= num:
        return indices
    # The permutation is drawn on the CPU, so that a seed means the same on every device.
    return indices[torch.randperm(len(indices))[:num].to(indices.device)]


@TASK_UTILS.register_module()
class RandomSampler:
    """At most ``num`` boxes, of which at most ``pos_fraction`` positive, drawn at random.

    Args:
        num: boxes an image.
        pos_fraction: share of positives, if there are as many.
        neg_pos_ub: at most so many negatives a positive; -1 for no bound.
        add_gt_as_proposals: objects are proposals too (of themselves).
    """

    def __init__(
        self,
        num: int,
        pos_fraction: float,
        neg_pos_ub: float = -1,
        add_gt_as_proposals: bool = False,
    ) -> None:
        self.num = num
        self.pos_fraction = pos_fraction
        self.neg_pos_ub = neg_pos_ub
        self.add_gt_as_proposals = add_gt_as_proposals

    def sample(self, assigned: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of positives (P,) and negatives (M,), P + M <= num, from the assigner's result (N,)."""
        positive = random_choice((assigned >= 0).nonzero()[:, 0], int(self.num * self.pos_fraction))
        num_negative = self.num - len(positive)
        if self.neg_pos_ub >= 0:
            num_negative = min(num_negative, int(self.neg_pos_ub * max(len(positive), 1)))
        negative = random_choice((assigned == BACKGROUND).nonzero()[:, 0], num_negative)
        return positive, negative
