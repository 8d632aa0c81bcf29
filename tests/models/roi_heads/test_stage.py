from collections.abc import Callable

import torch
from pycocotools import mask as coco_mask

from mmdet.models.roi_heads.mask_head import FCNMaskHead
from mmdet.models.roi_heads.stage import Detections, results_of, sample_rois
from mmdet.models.task_modules.assigner import MaxIoUAssigner
from mmdet.models.task_modules.sampler import RandomSampler

ASSIGNER = MaxIoUAssigner(0.5, 0.5, 0.5)


def test_objects_come_before_proposals(make_sample: Callable) -> None:
    sample = make_sample([[10., 10., 30., 30.], [40., 10., 60., 50.]], labels=[3, 1])
    proposals = torch.tensor(
        [[0., 0., 5., 5.], [41., 11., 60., 50.], [70., 0., 90., 9.], [11., 10., 30., 30.]])
    sampler = RandomSampler(100, 0.5, add_gt_as_proposals=True)
    [found] = sample_rois([proposals], [sample], ASSIGNER, sampler, 5)
    assert torch.equal(found.boxes, torch.cat([sample.boxes, proposals[[1, 3, 0, 2]]]))
    assert found.labels.tolist() == [3, 1, 1, 3, 5, 5]
    assert found.matched.tolist() == [0, 1, 1, 0]
    assert found.is_object.tolist() == [True, True, False, False, False, False]
    [without] = sample_rois([proposals], [sample], ASSIGNER, RandomSampler(100, 0.5), 5)
    assert torch.equal(without.boxes, proposals[[1, 3, 0, 2]]) and not without.is_object.any()


def test_objects_stand_for_themselves(make_sample: Callable) -> None:
    sampler = RandomSampler(100, 0.5, add_gt_as_proposals=True)
    twins = make_sample([[10., 10., 30., 30.], [10., 10., 30., 30.]], labels=[3, 1])
    assert sample_rois([torch.zeros(0, 4)], [twins], ASSIGNER, sampler, 5)[0].labels.tolist() == [3, 1]
    # The proposal overlaps the first most (0.8), but is the best that the second has (0.51).
    sample = make_sample([[0., 0., 10., 10.], [0., 0., 10., 6.4]], labels=[3, 1])
    proposal = torch.tensor([[0., 0., 10., 12.5]])
    assert sample_rois([proposal], [sample], ASSIGNER, sampler, 5)[0].labels.tolist() == [3, 1, 1]
    strict = MaxIoUAssigner(0.5, 0.5, 0.5, match_low_quality=False)
    assert sample_rois([proposal], [sample], strict, sampler, 5)[0].labels.tolist() == [3, 1, 3]


def test_crowds_alone_are_background(make_sample: Callable) -> None:
    proposals = torch.tensor([[0., 0., 20., 20.], [50., 50., 60., 60.]])
    sample = make_sample([], crowd=[[0., 0., 30., 30.]])
    sampler = RandomSampler(100, 0.5, add_gt_as_proposals=True)
    assert sample_rois([proposals], [sample], ASSIGNER, sampler, 5)[0].labels.tolist() == [5, 5]
    shielding = MaxIoUAssigner(0.5, 0.5, 0.5, ignore_iof_thr=0.5)
    assert torch.equal(sample_rois([proposals], [sample], shielding, sampler, 5)[0].boxes, proposals[1:])


def test_detections_are_in_pixels_of_the_original(make_sample: Callable) -> None:
    class Head:
        """A mask whose left ``share`` is object, of class 1."""

        def __init__(self, share: float) -> None:
            self.share = share

        def __call__(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            assert labels.tolist() == [1, 1]
            return features

        def predict(self, logits: torch.Tensor) -> torch.Tensor:
            masks = torch.zeros(2, 28, 28)
            masks[:, :, :int(28 * self.share)] = 1
            return masks

        paste = FCNMaskHead.paste

    sample = make_sample([])
    sample.ori_shape, sample.scale_factor = (32, 192), (0.5, 2.0)
    roi = torch.tensor([[8., 8., 36., 36.]])
    label = torch.tensor([1])
    detections = [Detections(roi, torch.tensor([[16., 4., 72., 18.]]), torch.tensor([0.9]), label),
                  Detections(roi, roi, torch.tensor([0.8]), label)]
    samples = [sample, make_sample([])]

    def extractor(features: list, rois: torch.Tensor) -> torch.Tensor:
        # The features are the resized image's.
        assert rois.tolist() == [[0, 8, 8, 36, 36], [1, 8, 8, 36, 36]]
        return rois

    heads: list = [Head(0.5), Head(0.75)]
    first, second = results_of([], detections, samples, extractor, heads, dict(mask_thr_binary=0.5))
    assert first['boxes'].tolist() == [[16, 4, 72, 18]] and second['boxes'].tolist() == [[8, 8, 36, 36]]
    # The mean is 1 on the left half and 0.5 on the next quarter of 56 pixels; the edge is mixed.
    mask = coco_mask.decode(first['masks'][0])
    assert mask.shape == (32, 192) and (mask[4:18, 17:57] == 1).all() and mask[:, 59:].sum() == 0
    assert second['masks'][0]['size'] == [64, 96]
    assert results_of([], detections, samples, extractor, heads, {})[0]['masks'] == first['masks']
    assert 'masks' not in results_of([], detections, samples, None, [], {})[0]
