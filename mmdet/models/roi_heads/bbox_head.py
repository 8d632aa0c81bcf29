"""Class and box of each RoI (Fast R-CNN, arXiv 1504.08083).

``K`` RoIs, ``P`` positive ones; class ``num_classes`` is background.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.conv import ConvModule, blocked, dense
from mmdet.models.layers.norm import NormConfig
from mmdet.models.roi_heads.stage import Detections, SampledRoIs
from mmdet.models.train_test_cfg import RCNNTestConfig
from mmdet.ops import batched_nms
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.boxes import per_image, tensor_like
from mmdet.structures.data_sample import DataSample


@MODELS.register_module()
class ConvFCBBoxHead(nn.Module):
    """Shared 3x3 convolutions and fully connected layers, then class logits and box deltas.

    Args:
        in_channels, roi_feat_size: RoI features are (K, in_channels, roi_feat_size, roi_feat_size).
        num_classes: without background.
        bbox_coder, loss_cls, loss_bbox: configs of the parts.
        reg_class_agnostic: one box a RoI, rather than one a class.
        num_shared_convs, conv_out_channels, norm_cfg: the convolutions, and the norm after each.
        num_shared_fcs, fc_out_channels: the fully connected layers.
    """

    def __init__(
        self,
        in_channels: int,
        roi_feat_size: int,
        num_classes: int,
        bbox_coder: dict[str, Any],
        loss_cls: dict[str, Any],
        loss_bbox: dict[str, Any],
        reg_class_agnostic: bool = False,
        num_shared_convs: int = 0,
        conv_out_channels: int = 256,
        norm_cfg: NormConfig | None = None,
        num_shared_fcs: int = 2,
        fc_out_channels: int = 1024,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.reg_class_agnostic = reg_class_agnostic
        self.bbox_coder = TASK_UTILS.build(bbox_coder)
        self.loss_cls = MODELS.build(loss_cls)
        self.loss_bbox = MODELS.build(loss_bbox)

        self.shared_convs = nn.ModuleList()
        for _ in range(num_shared_convs):
            self.shared_convs.append(ConvModule(in_channels, conv_out_channels, 3, norm_cfg, relu=True))
            in_channels = conv_out_channels
        features = in_channels * roi_feat_size**2
        self.shared_fcs = nn.ModuleList()
        for _ in range(num_shared_fcs):
            self.shared_fcs.append(_linear(features, fc_out_channels))
            features = fc_out_channels
        self.fc_cls = _linear(features, num_classes + 1, std=0.01)
        self.fc_reg = _linear(features, 4 if reg_class_agnostic else 4 * num_classes, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features (K, C, S, S) to logits (K, num_classes + 1), deltas (K, 4 * num_classes) or (K, 4)."""
        if self.shared_convs:
            x = blocked(x, [conv.bn for conv in self.shared_convs])
        for conv in self.shared_convs:
            x = conv(x)
        x = dense(x).flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x), inplace=True)
        logits, deltas = self.fc_cls(x), self.fc_reg(x)
        # Under autocast the layers compute in half precision, too coarse for boxes.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(dtype), deltas.to(dtype)

    def loss(
        self, logits: Tensor, deltas: Tensor, sampled: list[SampledRoIs], samples: list[DataSample]
    ) -> dict[str, Tensor]:
        """``loss_cls``, ``loss_bbox`` and the accuracy ``acc`` in percent.

        ``logits`` and ``deltas`` are what :meth:`forward` gave for the sampled RoIs of all images.
        """
        labels = torch.cat([s.labels for s in sampled])

        def positives(rows: Sequence[Tensor]) -> Tensor:
            """They come first in each image, and are known by number: to look for them makes a GPU wait."""
            return torch.cat([part[:len(s.matched)] for part, s in zip(rows, sampled)])

        targets = self.bbox_coder.encode(
            positives([s.boxes for s in sampled]),
            torch.cat([sample.boxes[s.matched] for s, sample in zip(sampled, samples)]))
        deltas, columns = self._of_class(
            positives(deltas.split([len(s.labels) for s in sampled])), positives([s.labels for s in sampled]))
        row = torch.arange(len(columns), device=columns.device)
        # Both losses are divided by all RoIs: a batch of few objects should not weigh them more.
        num_rois = max(len(labels), 1)
        correct = logits.argmax(dim=1) == labels
        return dict(
            loss_cls=self.loss_cls(logits, labels, num_rois),
            loss_bbox=self.loss_bbox(deltas[row, columns], targets, num_rois),
            acc=correct.sum() * 100.0 / num_rois)

    def refine(
        self, logits: Tensor, deltas: Tensor, rois: Tensor, labels: Tensor, samples: list[DataSample]
    ) -> Tensor:
        """The boxes (K, 4) of RoIs (K, 5) moved by their deltas, for the next stage of a cascade.

        Where the deltas are a class each, a RoI takes those of its label (K,), or of the likeliest
        class if that is background.
        """
        classes = torch.where(labels < self.num_classes, labels, logits[:, :-1].argmax(dim=1))
        deltas, columns = self._of_class(deltas, classes)
        rows = torch.arange(len(rois), device=rois.device)
        shapes = tensor_like([s.img_shape for s in samples], rois)[rois[:, 0].long()]
        return self.bbox_coder.decode(rois[:, 1:], deltas[rows, columns], shapes)

    def _of_class(self, deltas: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Deltas (K, num_classes or 1, 4) and each label's column (n,): 0 where one box serves all."""
        columns = torch.zeros_like(labels) if self.reg_class_agnostic else labels
        return deltas.unflatten(1, (-1, 4)), columns

    def predict(
        self, scores: Tensor, deltas: Tensor, rois: Tensor, samples: list[DataSample], cfg: RCNNTestConfig
    ) -> list[Detections]:
        """Detections of each image, best first.

        Args:
            scores: probabilities (K, num_classes + 1).
            deltas, rois: (K, 4 * num_classes) or (K, 4), and the RoIs (K, 5) of all images.
        """
        roi, labels = (scores[:, :-1] > cfg['score_thr']).nonzero(as_tuple=True)
        scores = scores[roi, labels]
        deltas, columns = self._of_class(deltas, labels)
        images = rois[roi, 0].long()
        shapes = tensor_like([s.img_shape for s in samples], rois)[images]
        boxes = self.bbox_coder.decode(rois[roi, 1:], deltas[roi, columns], shapes)
        scales = tensor_like([s.scale_factor for s in samples], rois)[images]
        original = self.bbox_coder.to_original(boxes, scales)
        groups = images * self.num_classes + labels
        keep = batched_nms(original, scores, groups, cfg['nms']['iou_threshold'])
        return [
            Detections(boxes[k], original[k], scores[k], labels[k])
            for k in per_image(keep, images[keep], len(samples), cfg['max_per_img'])]


def _linear(in_features: int, out_features: int, std: float | None = None) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
