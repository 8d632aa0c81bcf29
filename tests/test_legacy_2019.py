"""The 2019 mode against what the 2019 code computed, function by function and for whole models.

Left out of the recorded cases, since the behaviour is not kept: `group_sampler` (an order that ignores
the seed) and `image_transform_small_flip` (pixels normalised in the loader, not in the model).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare_reference import compare
from mmengine.config import ConfigDict
from mmengine.optim import LinearLR
from pycocotools import mask as coco_mask
from torch import Tensor

from mmdet.apis import init_detector
from mmdet.legacy_2019 import (
    LAST_PIXEL,
    AnchorGenerator2019,
    DeltaXYWHBBoxCoder2019,
    FCNMaskHead2019,
    Resize2019,
    choose_numerics,
    legacy_2019,
)
from mmdet.models.layers.context_block import ContextBlock
from mmdet.models.layers.deform_conv import DeformConv2d
from mmdet.models.losses import CrossEntropyLoss, SmoothL1Loss
from mmdet.models.roi_heads.roi_extractor import SingleRoIExtractor
from mmdet.models.task_modules.assigner import BACKGROUND, IGNORED, MaxIoUAssigner
from mmdet.ops import batched_nms, nms, roi_align
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures.boxes import box_iof, box_iou
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import crop_masks
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
GCNET = ROOT / 'configs' / 'gcnet'

pytestmark = pytest.mark.shared('golden_2019', 'published_keys')


@pytest.fixture
def units(shared_dir: Path) -> dict[str, Any]:
    return json.loads((shared_dir / 'golden_2019' / 'units.json').read_text())


def half_open(boxes: list) -> Tensor:
    return torch.tensor(boxes).reshape(-1, 4) + torch.tensor(LAST_PIXEL)


def close(found: Tensor, expected: Any, atol: float = 1e-4) -> None:
    expected = torch.tensor(expected).reshape(found.shape)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=atol)


def test_anchors(units: dict[str, Any]) -> None:
    generator = AnchorGenerator2019([4, 8, 16, 32, 64], [0.5, 1, 2], [8])
    for stride in generator.strides:
        expected = half_open(units['anchors'][str(stride)])
        assert torch.equal(generator.base_anchors(stride).float(), expected)
    generator = AnchorGenerator2019([16], [0.5, 1, 2], [8])
    [grid] = generator.grid_anchors([torch.zeros(1, 1, 2, 3)], torch.float32)
    assert torch.equal(grid, half_open(units['anchor_grid_stride16_2x3']))


def test_overlaps(units: dict[str, Any]) -> None:
    case = units['iou']
    a, b = half_open(case['a']), half_open(case['b'])
    close(box_iou(a, b), case['iou'], 1e-6)
    close(box_iof(a, b), case['iof'], 1e-6)


def test_deltas(units: dict[str, Any]) -> None:
    case = units['delta']
    coder = DeltaXYWHBBoxCoder2019(target_stds=case['stds'])
    proposals = half_open(case['proposals'])
    close(coder.encode(proposals, half_open(case['gt'])), case['encoded'])
    clipped = coder.decode(proposals, torch.tensor(case['encoded']), tuple(case['decoded_clip_max_shape']))
    torch.testing.assert_close(clipped, half_open(case['decoded_clip']), rtol=1e-5, atol=1e-3)


def test_assignment(units: dict[str, Any]) -> None:
    for name, thresholds in (('assign_rpn', (0.7, 0.3, 0.3)), ('assign_rcnn', (0.5, 0.5, 0.5))):
        assigner = MaxIoUAssigner(*thresholds)
        case = units[name]
        found = assigner.assign(half_open(case['boxes']), half_open(case['gt']), torch.zeros(0, 4))
        # 2019: -1 ignored, 0 background, k the object k - 1.
        expected = torch.tensor(case['gt_inds']) - 1
        expected[expected == -2], expected[torch.tensor(case['gt_inds']) == 0] = IGNORED, BACKGROUND
        assert torch.equal(found, expected)


def test_roi_levels(units: dict[str, Any]) -> None:
    case = units['roi_levels']
    rois = torch.tensor(case['rois'])
    rois[:, 1:] += torch.tensor(LAST_PIXEL)
    levels = [torch.full((1, 1, 1, 1), i + 1.0) for i in range(4)]
    layer = dict(type='RoIAlign', output_size=1, sampling_ratio=1)
    extractor = SingleRoIExtractor(layer, 1, [10_000] * 4)  # all samples are in a level's one cell
    assert (extractor(levels, rois) - 1).flatten().tolist() == case['levels']


def test_roi_align(units: dict[str, Any]) -> None:
    case = units['roi_align']
    features, rois = torch.tensor(case['feat']), torch.tensor(case['rois'])
    rois[:, 1:] += torch.tensor(LAST_PIXEL)
    layer = dict(type='RoIAlign', output_size=3, sampling_ratio=2)
    extractor = SingleRoIExtractor(layer, features.shape[1], [8], shift=0.5)
    close(extractor([features], rois), case['out'], 1e-5)
    # Without the shift the numbers are others.
    assert not torch.allclose(roi_align(features, rois, 3, 1 / 8, 2), torch.tensor(case['out']), atol=1e-2)


def test_nms(units: dict[str, Any]) -> None:
    case = units['nms']
    dets = torch.tensor(case['dets'])
    keep = nms(half_open(dets[:, :4].tolist()), dets[:, 4], case['thr'])
    assert sorted(keep.tolist()) == case['keep']


def test_nms_of_all_classes(units: dict[str, Any]) -> None:
    case = units['multiclass_nms']
    scores = torch.tensor(case['scores'])[:, 1:]
    roi, label = (scores > case['score_thr']).nonzero(as_tuple=True)
    boxes, score = half_open(case['boxes'])[roi], scores[roi, label]
    for name, limit in (('max10', 10), ('max100', 100)):
        keep = batched_nms(boxes, score, label, case['iou_thr'])[:limit]
        expected = sorted(zip(case[name]['labels'], (row[4] for row in case[name]['dets'])))
        found = sorted(zip(label[keep].tolist(), score[keep].tolist()))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def mask_head() -> FCNMaskHead2019:
    return FCNMaskHead2019(0, 2, 2, 3, dict(type='CrossEntropyLoss', use_sigmoid=True))


def test_mask_targets(units: dict[str, Any]) -> None:
    case = units['mask_target']
    y, x = np.mgrid[:60, :80]
    masks = np.stack([(y >= 10) & (y < 40) & (x >= 5) & (x < 50), (x - 40)**2 + (y - 30)**2 < 22**2])
    sample = DataSample(1, '', (60, 80), (60, 80), masks=crop_masks(torch.from_numpy(masks.astype(np.uint8))))
    boxes, matched = half_open(case['proposals']), torch.tensor(case['gt_inds'])
    found = mask_head().targets(boxes, matched, sample, case['size'])
    assert torch.equal(found.float(), torch.tensor(case['targets']).reshape(found.shape))


def test_mask_paste(units: dict[str, Any]) -> None:
    case = units['mask_paste']
    boxes = torch.tensor(case['det_bboxes_test_scale'])[:, :4]
    original = boxes / case['scale_factor'] + torch.tensor(LAST_PIXEL)
    head, labels = mask_head(), torch.tensor(case['labels'])
    # Channel 0 was background's.
    logits = torch.tensor(case['logits'])[torch.arange(len(labels)), labels + 1]
    probabilities = head.predict(logits[:, None]).requires_grad_()  # outside of torch.no_grad()
    found = head.paste(probabilities, original, tuple(case['ori_shape']), 0.5)
    rles = [rle for masks in case['rle'] for rle in masks]
    for rle, expected in zip(found, rles, strict=True):
        expected = dict(expected, counts=expected['counts'].encode())
        assert (coco_mask.decode(rle) == coco_mask.decode(expected)).all()


def test_sizes_of_images(units: dict[str, Any]) -> None:
    for case in units['image_resize_1333x800']:
        height, width = case['ori']
        results = dict(img=np.zeros((height, width, 3), np.uint8), img_shape=(height, width))
        found = Resize2019(scale=(1333, 800)).transform(results)
        assert [*found['img_shape'], 3] == case['img_shape'] and found['img'].shape[:2] == found['img_shape']
        assert found['scale_factor'] == (case['scale_factor'], case['scale_factor'])


def test_boxes_of_resized_images(units: dict[str, Any]) -> None:
    case = units['bbox_transform']
    height, width = case['img_shape']
    results = dict(
        img=np.zeros((80, 100, 3), np.uint8), img_shape=(80, 100), boxes=half_open(case['boxes']).numpy())
    found = Resize2019(scale=(width, height)).transform(results)
    assert found['scale_factor'][0] == case['scale']
    np.testing.assert_allclose(found['boxes'], half_open(case['noflip']).numpy(), rtol=1e-6)


def test_losses(units: dict[str, Any]) -> None:
    case = units['rpn_bce']
    used = torch.tensor(case['weights']) > 0
    loss = CrossEntropyLoss(use_sigmoid=True)(
        torch.tensor(case['logits'])[used, 0], torch.tensor(case['labels'])[used], case['avg_factor'])
    assert loss.item() == pytest.approx(case['loss'], rel=1e-6)
    case = units['cross_entropy']
    used = torch.tensor(case['weights']) > 0
    loss = CrossEntropyLoss()(
        torch.tensor(case['logits'])[used], torch.tensor(case['labels'])[used], case['avg_factor'])
    assert loss.item() == pytest.approx(case['loss'], rel=1e-6)
    case = units['smooth_l1']
    used = torch.tensor(case['weight_rows']) > 0
    pred, target = torch.tensor(case['pred'])[used], torch.tensor(case['target'])[used]
    for beta, expected in ((1.0, case['beta1']), (1 / 9, case['beta_ninth'])):
        loss = SmoothL1Loss(beta=beta)(pred, target, case['avg_factor'])
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_deformable_convolution(units: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = units['deform_conv']
    x, offset, weight = (torch.tensor(case[key]) for key in ('x', 'offset', 'weight'))
    layer = DeformConv2d(x.shape[1], len(weight), stride=2, groups=2, modulated=False, deform_groups=1)
    layer.weight.data = weight
    monkeypatch.setattr(layer.conv_offset, 'forward', lambda x: offset)
    close(layer(x), case['out'], 1e-5)


def test_anchors_inside_the_image(units: dict[str, Any]) -> None:
    case = units['inside_flags']
    cfg = legacy_2019(load_config(GCNET / 'mask_rcnn_r50_fpn_1x.py'))
    head = MODELS.build(dict(cfg.model.rpn_head, train_cfg=cfg.model.train_cfg.rpn))
    sample = DataSample(1, '', (0, 0), tuple(case['img_shape']))
    anchors = half_open(case['anchors'])
    assigned = head._assign(anchors, torch.ones(len(anchors), dtype=torch.bool), sample)
    # Without objects every anchor that counts is background.
    expected = torch.where(torch.tensor(case['inside']).bool(), BACKGROUND, IGNORED)
    assert assigned.tolist() == expected.tolist()


def test_context_block(units: dict[str, Any]) -> None:
    case = units['gc_block']
    block = ContextBlock(case['inplanes'], case['ratio'])
    block.load_state_dict({name: torch.tensor(value) for name, value in case['params'].items()})
    x, expected = (torch.tensor(case[key]) for key in ('x', 'out'))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_warm_up(units: dict[str, Any]) -> None:
    cfg = legacy_2019(load_config(GCNET / 'mask_rcnn_r50_fpn_1x.py'))
    options = dict(cfg.param_scheduler[0])
    assert options.pop('type') == 'LinearLR'
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    scheduler, rates = LinearLR(optimizer, **options), []
    for _ in range(501):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    for iteration, rate in units['lr_1x']['warmup'].items():
        assert rates[int(iteration)] == pytest.approx(rate, rel=1e-9)


def test_the_config_is_left_alone_and_the_new_one_checks(tmp_path: Path) -> None:
    for path in sorted(GCNET.glob('*.py')):
        cfg = load_config(path)
        before = cfg.pretty_text
        changed = legacy_2019(cfg)
        assert cfg.pretty_text == before
        assert changed.model.rpn_head.anchor_generator.type == 'AnchorGenerator2019'
        assert changed.train_dataloader.dataset.pipeline[2].type == 'Resize2019'
        assert changed.test_dataloader.dataset.pipeline[1].type == 'Resize2019'
        assert changed.optim_wrapper.clip_grad == dict(max_norm=35, norm_type=2)
        changed.dump(tmp_path / path.name)  # as a training leaves it in its folder
        again = load_config(tmp_path / path.name)
        assert again.legacy_2019 and legacy_2019(again) is again


def test_a_flag_the_config_or_the_checkpoint_asks_for_the_numerics() -> None:
    path, mark = GCNET / 'mask_rcnn_r50_fpn_1x.py', dict(legacy_2019=True)
    cfg = load_config(path)
    assert choose_numerics(cfg, {}) is cfg
    for found in (choose_numerics(cfg, {}, asked=True), choose_numerics(cfg, mark),
                  choose_numerics(load_config(path, mark), {})):
        assert found.model.rpn_head.anchor_generator.type == 'AnchorGenerator2019'


def test_the_key_of_a_config_asks_for_the_numerics_too(tmp_path: Path) -> None:
    text = f"_base_ = '{GCNET / 'mask_rcnn_r50_fpn_1x.py'}'\nlegacy_2019 = True\n"
    text += "param_scheduler = dict(_delete_=True, type='LinearLR', start_factor=0.1, end=9)\n"
    (tmp_path / 'old.py').write_text(text)
    cfg = init_detector(tmp_path / 'old.py', cfg_options={'model.backbone.pretrained': None}).cfg
    assert cfg.model.roi_head.bbox_roi_extractor.shift == 0.5
    assert cfg.param_scheduler.end == 501


def test_multi_scale_training_in_a_wrapped_data_set() -> None:
    cfg = load_config(GCNET / 'mask_rcnn_r50_fpn_1x.py')
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline[2] = ConfigDict(type='RandomChoiceResize', scales=[(1333, 640), (1333, 800)])
    cfg.train_dataloader.dataset = ConfigDict(type='RepeatDataset', times=2, dataset=dataset)
    changed = legacy_2019(cfg).train_dataloader.dataset.dataset.pipeline[2]
    resize, seen = TRANSFORMS.build(changed), set()
    for seed in range(8):
        boxes = np.array([[3, 5, 20, 31]], np.float32)
        results = dict(img=np.zeros((48, 64, 3), np.uint8), img_shape=(48, 64), boxes=boxes)
        found = resize.transform(results | dict(rng=np.random.default_rng(seed)))
        seen.add(found['img_shape'][0])
        expected = Resize2019((1333, found['img_shape'][0])).transform(dict(results))
        np.testing.assert_array_equal(found['boxes'], expected['boxes'])
    assert seen == {640, 800}


@pytest.mark.parametrize('config, golden', [
    ('mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x', 'r50_fixbn_r4'),
    pytest.param('mask_rcnn_r50_fpn_1x', 'r50_fixbn', marks=pytest.mark.slow)])
def test_whole_models(config: str, golden: str, shared_dir: Path, capsys: Callable) -> None:
    found = compare(str(GCNET / f'{config}.py'), shared_dir / 'golden_2019' / f'{golden}.json')
    assert len(found.rows) > 60 and found.failed == [], found.table()
