"""Mask of each RoI (Mask R-CNN, arXiv 1703.06870, figure 4 on the right)."""

from concurrent.futures import Executor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.conv import ConvModule, blocked, dense
from mmdet.models.layers.norm import NormConfig
from mmdet.ops import mask_targets
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

    What ``paste`` does is left to ``encoder``, where that is set; the masks are futures then.
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
        self.encoder: Executor | None = None
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

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """RoI features (K, in_channels, S, S) to logits (K, num_classes, 2 * S, 2 * S).

        With labels (K,) only the logits of a RoI's own class are computed: (K, 1, 2 * S, 2 * S).
        """
        x = blocked(x, [layer.bn for layer in self.convs])
        for layer in self.convs:
            x = layer(x)
        deconv, conv = self.upsample, self.conv_logits
        assert deconv.bias is not None and conv.bias is not None
        # The deconvolution's kernels don't overlap: each of 4 positions is a 1x1 convolution. What follows
        # treats positions alike, so that only the logits have to be brought into order.
        weight = deconv.weight.permute(2, 3, 1, 0).flatten(0, 2)[:, :, None, None]
        x = dense(F.relu(F.conv2d(x, weight, deconv.bias.repeat(4)), inplace=True))
        hidden = x.unflatten(1, (4, -1)).flatten(3)
        weight, bias = conv.weight.flatten(1), conv.bias[:, None]
        if labels is not None:
            weight, bias = weight[labels, None, None], bias[labels, None, None]
        logits = (weight @ hidden + bias).unflatten(3, x.shape[2:]).unflatten(1, (2, 2))
        return logits.permute(0, 3, 4, 1, 5, 2).flatten(2, 3).flatten(3, 4)

    def loss(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``loss_mask`` of the logits (P, 1, M, M) of each RoI's class and targets (P, M, M) 0 / 1."""
        return dict(loss_mask=self.loss_mask(logits[:, 0], targets))

    def targets(self, boxes: Tensor, matched: Tensor, sample: DataSample, size: int) -> Tensor:
        """The masks of the objects ``matched`` (P,) inside boxes (P, 4): (P, size, size) bool."""
        if sample.masks is None:
            raise ValueError(f'{sample.img_path}: no masks to train the mask head with; '
                             'set with_mask=True in LoadAnnotations, or model.roi_head.mask_head=None')
        return mask_targets(*sample.masks, boxes, matched, sample.img_shape, size)

    def predict(self, logits: Tensor) -> Tensor:
        """Probabilities (n, M, M) from the logits (n, 1, M, M) of each RoI's class."""
        return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()

    def paste(self, masks: Tensor, boxes: Tensor, shape: tuple[int, int], threshold: float) -> list[RLE]:
        """Probabilities (n, M, M) inside boxes (n, 4) to masks of an image of ``shape``, as COCO RLE."""
        return paste_masks(masks, boxes, shape, threshold)
