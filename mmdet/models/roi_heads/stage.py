"""One stage of RoI heads: sample proposals, losses of box and mask head, and masks of detections.

``K`` sampled RoIs of an image, ``P`` positive ones, ``G`` objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdet.models.train_test_cfg import RCNNTestConfig
from mmdet.structures.boxes import boxes_to_rois
from mmdet.structures.data_sample import DataSample


@dataclass
class SampledRoIs:
    """The RoIs of one image to train on, positives first."""

    boxes: Tensor
    """(K, 4)."""
    labels: Tensor
    """(K,) int64; ``num_classes`` for background."""
    matched: Tensor
    """(P,) int64: the object of each positive."""
    is_object: Tensor
    """(K,) bool: the RoI is an object's own box, added as a proposal."""


class Detections(NamedTuple):
    """The ``n`` detections of one image."""

    rois: Tensor
    """(n, 4) in pixels of the resized image."""
    boxes: Tensor
    """(n, 4) in pixels of the original image."""
    scores: Tensor
    """(n,)."""
    labels: Tensor
    """(n,) int64."""


def sample_rois(
    proposals: Sequence[Tensor], samples: Sequence[DataSample], assigner: Any, sampler: Any, num_classes: int
) -> list[SampledRoIs]:
    """Of each image assign proposals (n_i, 4), and the objects if the sampler says so, and sample."""
    candidates, assigned = list(proposals), []
    for i, sample in enumerate(samples):
        assigned.append(assigner.assign(candidates[i], sample.boxes, sample.ignored_boxes))
        if sampler.add_gt_as_proposals:
            # Each stands for itself. They take no part above, where they would be every object's best box.
            candidates[i] = torch.cat([sample.boxes.to(candidates[i].dtype), candidates[i]])
            assigned[i] = torch.cat([torch.arange(len(sample.boxes), device=assigned[i].device), assigned[i]])
    found = []
    for i, (positive, negative) in enumerate(sampler.sample(assigned)):
        chosen, matched = torch.cat([positive, negative]), assigned[i][positive]
        labels, num_objects = samples[i].labels, len(candidates[i]) - len(proposals[i])
        found.append(SampledRoIs(
            boxes=candidates[i][chosen],
            labels=torch.cat([labels[matched], labels.new_full((len(negative),), num_classes)]),
            matched=matched,
            is_object=chosen < num_objects))
    return found


def mask_loss(
    features: list[Tensor], sampled: list[SampledRoIs], samples: list[DataSample],
    extractor: Any, mask_head: Any, mask_size: int,
) -> dict[str, Tensor]:
    """The mask head's losses on the positive RoIs of all images; ``features`` are levels (N, C, H_i, W_i)."""
    boxes = [s.boxes[:len(s.matched)] for s in sampled]
    labels = torch.cat([s.labels[:len(s.matched)] for s in sampled])
    targets = torch.cat([
        mask_head.targets(b, s.matched, sample, mask_size) for b, s, sample in zip(boxes, sampled, samples)])
    return mask_head.loss(mask_head(extractor(features, boxes_to_rois(boxes)), labels), targets)


def results_of(
    features: list[Tensor], detections: list[Detections], samples: list[DataSample],
    extractor: Any, mask_heads: list[Any], test_cfg: RCNNTestConfig,
) -> list[dict[str, Any]]:
    """``boxes`` (n, 4), ``scores`` and ``labels`` (n,) of each image, in pixels of the original image.

    With mask heads also ``masks`` (n COCO RLEs, or their future), from the mean of the heads' probabilities.
    """
    results: list[dict[str, Any]] = [
        dict(boxes=d.boxes, scores=d.scores, labels=d.labels) for d in detections]
    if mask_heads:
        roi_features = extractor(features, boxes_to_rois([d.rois for d in detections]))
        labels = torch.cat([d.labels for d in detections])
        probabilities = torch.stack([h.predict(h(roi_features, labels)) for h in mask_heads]).mean(dim=0)
        per_image = probabilities.split([len(d.boxes) for d in detections])
        threshold = test_cfg.get('mask_thr_binary', 0.5)
        paste, encoder = mask_heads[0].paste, getattr(mask_heads[0], 'encoder', None)
        for result, masks, sample in zip(results, per_image, samples):
            args = masks, result['boxes'], sample.ori_shape, threshold
            result['masks'] = encoder.submit(paste, *args) if encoder else paste(*args)
    return results
