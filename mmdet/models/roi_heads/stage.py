"""One stage of RoI heads: sample proposals, losses of box and mask head, and masks of detections.

``K`` sampled RoIs of an image, ``P`` positive ones, ``G`` objects.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    proposals: Tensor, sample: DataSample, assigner: Any, sampler: Any, num_classes: int
) -> SampledRoIs:
    """Assign proposals (n, 4), and the objects themselves if the sampler says so, and sample."""
    assigned = assigner.assign(proposals, sample.boxes, sample.ignored_boxes)
    is_object = torch.zeros(len(proposals), dtype=torch.bool, device=proposals.device)
    if sampler.add_gt_as_proposals:
        # Each stands for itself. They take no part above, where they would be every object's best box.
        proposals = torch.cat([sample.boxes.to(proposals.dtype), proposals])
        is_object = torch.cat([is_object.new_ones(len(sample.boxes)), is_object])
        assigned = torch.cat([torch.arange(len(sample.boxes), device=assigned.device), assigned])
    positive, negative = sampler.sample(assigned)
    chosen = torch.cat([positive, negative])
    matched = assigned[positive]
    background = sample.labels.new_full((len(negative),), num_classes)
    return SampledRoIs(
        boxes=proposals[chosen],
        labels=torch.cat([sample.labels[matched], background]),
        matched=matched,
        is_object=is_object[chosen])


def mask_loss(
    features: list[Tensor], sampled: list[SampledRoIs], samples: list[DataSample],
    extractor: Any, mask_head: Any, mask_size: int,
) -> dict[str, Tensor]:
    """The mask head's losses on the positive RoIs of all images."""
    boxes = [s.boxes[:len(s.matched)] for s in sampled]
    labels = torch.cat([s.labels[:len(s.matched)] for s in sampled])
    targets = torch.cat([
        mask_head.targets(b, s.matched, sample, mask_size) for b, s, sample in zip(boxes, sampled, samples)])
    return mask_head.loss(mask_head(extractor(features, boxes_to_rois(boxes)), labels), targets)


def results_of(
    features: list[Tensor], detections: list[Detections], samples: list[DataSample],
    extractor: Any, mask_heads: list[Any], mask_threshold: float,
) -> list[dict[str, Any]]:
    """``boxes``, ``scores`` and ``labels`` of each image, in pixels of the original image.

    With mask heads also ``masks`` (n COCO RLEs, or their future), from the mean of the heads' probabilities.
    """
    results: list[dict[str, Any]] = [
        dict(boxes=d.boxes, scores=d.scores, labels=d.labels) for d in detections]
    if mask_heads:
        roi_features = extractor(features, boxes_to_rois([d.rois for d in detections]))
        labels = torch.cat([d.labels for d in detections])
        probabilities = torch.stack([h.predict(h(roi_features, labels)) for h in mask_heads]).mean(dim=0)
        per_image = probabilities.split([len(d.boxes) for d in detections])
        paste, encoder = mask_heads[0].paste, getattr(mask_heads[0], 'encoder', None)
        for result, masks, sample in zip(results, per_image, samples):
            args = masks, result['boxes'], sample.ori_shape, mask_threshold
            result['masks'] = encoder.submit(paste, *args) if encoder else paste(*args)
    return results
