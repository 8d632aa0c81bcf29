"""Losses: summed over elements and divided by ``avg_factor``, or the mean where it is None."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.registry import MODELS


def _reduce(loss: Tensor, avg_factor: float | None, loss_weight: float) -> Tensor:
    if avg_factor is None:
        # The mean of nothing is NaN: a batch without positives has loss 0.
        avg_factor = max(loss.numel(), 1)
    return loss.sum() / avg_factor * loss_weight


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """Softmax cross-entropy of logits (N, C) and labels (N,), or binary with ``use_sigmoid``."""

    def __init__(self, use_sigmoid: bool = False, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.use_sigmoid = use_sigmoid
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, target: Tensor, avg_factor: float | None = None) -> Tensor:
        """A scalar. ``target``: labels (N,) int64, or 0 / 1 of the logits' shape with use_sigmoid."""
        if self.use_sigmoid:
            # A target of another dtype would silently change the result's.
            loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction='none')
        else:
            loss = F.cross_entropy(logits, target, reduction='none')
        return _reduce(loss, avg_factor, self.loss_weight)


@MODELS.register_module()
class L1Loss(nn.Module):
    """Absolute difference."""

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float | None = None) -> Tensor:
        """A scalar, of two tensors of one shape."""
        return _reduce((pred - target).abs(), avg_factor, self.loss_weight)


@MODELS.register_module()
class SmoothL1Loss(nn.Module):
    """d^2 / (2 beta) where the absolute difference d < beta, else d - beta / 2 (Fast R-CNN, section 2.3)."""

    def __init__(self, beta: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.beta = beta
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float | None = None) -> Tensor:
        """A scalar, of two tensors of one shape."""
        loss = F.smooth_l1_loss(pred, target, reduction='none', beta=self.beta)
        return _reduce(loss, avg_factor, self.loss_weight)
