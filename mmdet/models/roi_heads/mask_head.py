"""Mask of each RoI (Mask R-CNN, arXiv 1703.06870, figure 4 on the right)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.conv_module import ConvModule
from mmdet.models.layers.norm import NormConfig
from mmdet.ops import roi_align
from mmdet.registry import MODELS
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import RLE, paste_masks


@MODELS.register_module()
class FCNMaskHead(nn.Module):
    """3x3 convolutions, a stride-2 deconvolution, and one mask of logits a class.

    Args:
        num_convs, in_channels, conv_out_channels, norm_cfg: the convolutions.
        num_classes: without background.
        loss_mask: config of the loss.
    """

    def __init__(
        self,
        num_convs: int,
        in_channels: int,
        conv_out_channels: int,
        num_classes: int,
        loss_mask: dict[str, Any],
        norm_cfg: NormConfig | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss_mask = MODELS.build(loss_mask)
        self.convs = nn.ModuleList()
        for _ in range(num_convs):
            self.convs.append(ConvModule(in_channels, conv_out_channels, 3, norm_cfg, relu=True))
            in_channels = conv_out_channels
        self.upsample = nn.ConvTranspose2d(in_channels, conv_out_channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(conv_out_channels, num_classes, 1)
        for layer in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """RoI features (K, in_channels, S, S) to logits (K, num_classes, 2 * S, 2 * S)."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x), inplace=True))

    def loss(self, logits: Tensor, targets: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``loss_mask`` of logits (P, num_classes, M, M), targets (P, M, M) 0 / 1 and labels (P,)."""
        return dict(loss_mask=self.loss_mask(_of_class(logits, labels), targets))

    def targets(self, boxes: Tensor, matched: Tensor, sample: DataSample, size: int) -> Tensor:
        """The masks of the objects ``matched`` (P,) inside boxes (P, 4): (P, size, size) bool."""
        if sample.masks is None:
            raise ValueError(f'{sample.img_path}: no masks to train the mask head with; '
                             'set with_mask=True in LoadAnnotations, or model.roi_head.mask_head=None')
        masks = sample.masks[:, None].to(boxes.dtype)
        rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
        return (roi_align(masks, rois, size, 1.0) >= 0.5)[:, 0]

    def predict(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (n, M, M) of the class in labels (n,)."""
        logits = _of_class(logits, labels)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()

    def paste(self, masks: Tensor, boxes: Tensor, shape: tuple[int, int], threshold: float) -> list[RLE]:
        """Probabilities (n, M, M) inside boxes (n, 4) to masks of an image of ``shape``, as COCO RLE."""
        return paste_masks(masks, boxes, shape, threshold)


def _of_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[torch.arange(len(labels), device=labels.device), labels]
