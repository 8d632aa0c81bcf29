"""A random subset of positive and negative boxes to train on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdet.models.task_modules.assigner import BACKGROUND
from mmdet.registry import TASK_UTILS


def random_choice(count: int, num: int) -> Tensor:
    """``num`` of the numbers below ``count``, each equally likely; all of them if there are no more.

    They are drawn on the CPU, so that a seed means the same on every device.
    """
    if count <= num:
        return torch.arange(count)
    # As ``randperm(count)[:num]``, which takes milliseconds for the background anchors of an image.
    chosen: dict[int, None] = {}
    while len(chosen) < num:
        chosen |= dict.fromkeys(torch.randint(count, (num,)).tolist())
    return torch.tensor(list(chosen)[:num], dtype=torch.int64)


def _pick(mask: Tensor, count: int, num: int) -> Tensor:
    """Indices of at most ``num`` of the ``count`` true elements of a mask (N,), at random."""
    nth = random_choice(count, num).to(mask.device, non_blocking=True)
    return torch.searchsorted(mask.cumsum(0), nth + 1)


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
        if num < 1 or not 0 <= pos_fraction <= 1:
            raise ValueError(f'RandomSampler: num={num} must be 1 or more, pos_fraction={pos_fraction} '
                             'lie in [0, 1]')
        self.num = num
        self.pos_fraction = pos_fraction
        self.neg_pos_ub = neg_pos_ub
        self.add_gt_as_proposals = add_gt_as_proposals

    def sample(self, assigned: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Indices of positives (P,) and negatives (M,), P + M <= num, of each image.

        ``assigned`` has the assigner's results (N_i,).
        """
        masks = [(a >= 0, a == BACKGROUND) for a in assigned]
        # The only wait for a GPU, one for all images.
        counts = torch.stack([torch.stack([mask.sum() for mask in pair]) for pair in masks]).tolist()
        picked = []
        for (is_positive, is_negative), (positives, negatives) in zip(masks, counts):
            positive = _pick(is_positive, positives, int(self.num * self.pos_fraction))
            num_negative = self.num - len(positive)
            if self.neg_pos_ub >= 0:
                num_negative = min(num_negative, int(self.neg_pos_ub * max(len(positive), 1)))
            picked.append((positive, _pick(is_negative, negatives, num_negative)))
        return picked
