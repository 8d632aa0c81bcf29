"""Every config loads and builds, and the published variants are what was published."""
import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet.registry import MODELS
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import crop_masks
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)
GCNET = {path.stem: path for path in CONFIGS if path.parent.name == 'gcnet'}
ABLATION = {path.stem: path for path in CONFIGS if path.parent.name == 'ablation'}

# Box and mask AP on COCO val2017, published with each variant.
PUBLISHED = {
    'mask_rcnn_r50_fpn_1x': (37.3, 34.2),
    'mask_rcnn_r16_gcb_c3-c5_r50_fpn_1x': (38.5, 35.1),
    'mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x': (38.9, 35.5),
    'mask_rcnn_r50_fpn_2x': (38.2, 34.9),
    'mask_rcnn_r16_gcb_c3-c5_r50_fpn_2x': (39.7, 36.1),
    'mask_rcnn_r4_gcb_c3-c5_r50_fpn_2x': (40.0, 36.2),
    'mask_rcnn_r50_fpn_syncbn_1x': (37.2, 33.8),
    'mask_rcnn_r16_gcb_c3-c5_r50_fpn_syncbn_1x': (39.4, 35.7),
    'mask_rcnn_r4_gcb_c3-c5_r50_fpn_syncbn_1x': (39.9, 36.2),
    'mask_rcnn_r50_fpn_syncbn_2x': (37.7, 34.3),
    'mask_rcnn_r16_gcb_c3-c5_r50_fpn_syncbn_2x': (39.7, 36.0),
    'mask_rcnn_r4_gcb_c3-c5_r50_fpn_syncbn_2x': (40.2, 36.3),
    'mask_rcnn_r50_fpn_syncbn_4conv1fc_syncbn_1x': (38.8, 34.6),
    'mask_rcnn_r16_gcb_c3-c5_r50_fpn_syncbn_4conv1fc_syncbn_1x': (41.0, 36.5),
    'mask_rcnn_r4_gcb_c3-c5_r50_fpn_syncbn_4conv1fc_syncbn_1x': (41.4, 37.0),
    'mask_rcnn_r101_fpn_1x': (39.4, 35.9),
    'mask_rcnn_r16_gcb_c3-c5_r101_fpn_1x': (40.8, 37.0),
    'mask_rcnn_r4_gcb_c3-c5_r101_fpn_1x': (40.8, 36.9),
    'mask_rcnn_r101_fpn_syncbn_1x': (39.8, 36.0),
    'mask_rcnn_r16_gcb_c3-c5_r101_fpn_syncbn_1x': (41.1, 37.4),
    'mask_rcnn_r4_gcb_c3-c5_r101_fpn_syncbn_1x': (41.7, 37.6),
    'mask_rcnn_x101_32x4d_fpn_syncbn_1x': (41.2, 37.3),
    'mask_rcnn_r16_gcb_c3-c5_x101_32x4d_fpn_syncbn_1x': (42.4, 38.0),
    'mask_rcnn_r4_gcb_c3-c5_x101_32x4d_fpn_syncbn_1x': (42.9, 38.5),
    'cascade_mask_rcnn_x101_32x4d_fpn_syncbn_1x': (44.7, 38.3),
    'cascade_mask_rcnn_r16_gcb_c3-c5_x101_32x4d_fpn_syncbn_1x': (45.9, 39.3),
    'cascade_mask_rcnn_r4_gcb_c3-c5_x101_32x4d_fpn_syncbn_1x': (46.5, 39.7),
    'cascade_mask_rcnn_dconv_c3-c5_x101_32x4d_fpn_syncbn_1x': (47.1, 40.4),
    'cascade_mask_rcnn_r16_gcb_dconv_c3-c5_x101_32x4d_fpn_syncbn_1x': (47.9, 40.9),
    'cascade_mask_rcnn_r4_gcb_dconv_c3-c5_x101_32x4d_fpn_syncbn_1x': (47.9, 40.8),
}


@cache
def load(path: Path) -> tuple[Config, nn.Module]:
    """A config and its model, which has neither memory nor initial values."""
    cfg = load_config(path)
    with torch.device('meta'):
        return cfg, MODELS.build(cfg.model)


def mmdet3_name(name: str) -> str:
    """The name of a variant's 1x config in mmdetection 3."""
    body = re.search(r'r50|r101|x101_32x4d', name).group().replace('_', '-')
    body += '-syncbn' if 'syncbn' in name else ''
    ratio = re.search(r'_r(16|4)_gcb', name)
    if name.startswith('cascade'):
        body += '-dconv-c3-c5' if 'dconv' in name else ''
        body += f'-r{ratio.group(1)}-gcb-c3-c5' if ratio else ''
        return f'cascade-mask-rcnn_{body}_fpn_1x_coco'
    body += f'-gcb-r{ratio.group(1)}-c3-c5' if ratio else ''
    return f'mask-rcnn_{body}_fpn_1x_coco'


def rows_of_background(model: nn.Module) -> int:
    """Parameters that the heads of 2019, whose class 0 is background, have beside these."""
    extra = 0
    for name, module in model.named_modules():
        if name.endswith('fc_reg') and module.out_features > 4:
            extra += 4 * (module.in_features + 1)
        elif name.endswith('conv_logits'):
            extra += module.in_channels + 1
    return extra


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_it_loads_and_builds(path: Path) -> None:
    _, model = load(path)
    assert sum(p.numel() for p in model.parameters()) > 10**6
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize('name', [*GCNET, *ABLATION])
def test_a_variant_is_short_and_flat(name: str) -> None:
    text = (GCNET | ABLATION)[name].read_text()
    assert len(text.splitlines()) <= 30
    assert len(re.findall(r"^    '(\.\./)+_base_/.*\.py',$", text, re.MULTILINE)) == 4


def test_names_are_the_published_ones() -> None:
    assert set(GCNET) == set(PUBLISHED)


@pytest.mark.parametrize('name', GCNET)
def test_published_ap(name: str) -> None:
    text = ast.get_docstring(ast.parse(GCNET[name].read_text()))
    box, mask = re.search(r'Published on COCO val2017: ([\d.]+) box AP, ([\d.]+) mask AP', text).groups()
    assert (float(box), float(mask)) == PUBLISHED[name]


@pytest.mark.parametrize('name', GCNET)
def test_the_name_says_what_it_is(name: str) -> None:
    cfg, _ = load(GCNET[name])
    backbone = cfg.model.backbone
    assert backbone.depth == (50 if 'r50' in name else 101)
    assert backbone.type == ('ResNeXt' if 'x101' in name else 'ResNet')
    ratio = re.search(r'_r(16|4)_gcb', name)
    assert (backbone.get('gcb') or {}).get('ratio') == (1 / int(ratio.group(1)) if ratio else None)
    assert tuple(backbone.get('stage_with_gcb', ())) == ((False, True, True, True) if ratio else ())
    assert backbone.norm_cfg.type == ('SyncBN' if 'syncbn' in name else 'BN')
    assert backbone.norm_eval == ('syncbn' not in name) and backbone.frozen_stages == 1
    epochs, milestones = (24, [16, 22]) if name.endswith('2x') else (12, [8, 11])
    assert cfg.train_cfg.max_epochs == epochs and cfg.param_scheduler[1].milestones == milestones
    assert cfg.param_scheduler[1].end == epochs


@pytest.mark.parametrize('name', ABLATION)
def test_an_ablation_differs_from_the_baseline_in_its_context_blocks_alone(name: str) -> None:
    cfg, base = (load(path)[0].to_dict() for path in (ABLATION[name], GCNET['mask_rcnn_r50_fpn_syncbn_1x']))
    for key in ('gcb', 'stage_with_gcb'):
        assert cfg['model']['backbone'].pop(key)
    assert cfg == base
    assert 'Published' not in ABLATION[name].read_text()


def test_no_two_ablations_are_the_same() -> None:
    published = [path for name, path in GCNET.items() if name.endswith('gcb_c3-c5_r50_fpn_syncbn_1x')]
    blocks = [load(path)[0].model.backbone for path in [*published, *ABLATION.values()]]
    assert len({str((b.gcb.to_dict(), b.stage_with_gcb)) for b in blocks}) == len(blocks) == 18


def test_readme_of_the_ablations() -> None:
    """It has every config, with its parameters, and the AP of those that were published."""
    text = (ROOT / 'configs/gcnet/ablation/README.md').read_text()
    rows = re.findall(r'\| \[(.*)\]\((.*)\) \| ([\d.]+) \| (.*) ?\|$', text, re.MULTILINE)
    assert {name for name, *_ in rows} == {*ABLATION, 'mask_rcnn_r50_fpn_syncbn_1x', *(
        f'mask_rcnn_r{ratio}_gcb_c3-c5_r50_fpn_syncbn_1x' for ratio in (4, 16))}
    for name, link, millions, ap in rows:
        path = (ROOT / 'configs/gcnet/ablation' / link).resolve()
        assert path == (GCNET | ABLATION)[name]
        assert f'{sum(p.numel() for p in load(path)[1].parameters()) / 1e6:.2f}' == millions
        assert ap.strip() == ('{} / {}'.format(*PUBLISHED[name]) if name in PUBLISHED else '')


@pytest.mark.shared('published_keys')
@pytest.mark.parametrize('name', [name for name in GCNET if '4conv1fc' not in name])
def test_parameters_have_the_names_and_shapes_of_mmdetection(name: str, shared_dir: Path) -> None:
    path = shared_dir / 'published_keys' / 'mmdet3' / f'{mmdet3_name(name)}.json'
    state = load(GCNET[name])[1].state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == json.loads(path.read_text())


@pytest.mark.shared('published_keys')
@pytest.mark.parametrize('name', sorted(set(GCNET) & set(PUBLISHED)))
def test_parameter_counts_are_the_published_ones(name: str, shared_dir: Path) -> None:
    variants = json.loads((shared_dir / 'published_keys' / 'params.json').read_text())
    # Two of the three names had 4conv1f.
    published = variants.get(name) or variants[name.replace('4conv1fc', '4conv1f')]
    _, model = load(GCNET[name])
    extra = rows_of_background(model)
    assert sum(p.numel() for p in model.parameters()) + extra == published['total_parameters']
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained + extra == published['trainable_parameters']


# The deeper ones and most ablations have the same parts as others, but for one with everything.
EVERYTHING = 'cascade_mask_rcnn_r4_gcb_dconv_c3-c5_x101_32x4d_fpn_syncbn_1x'
OTHER_BLOCKS = {f'mask_rcnn_{block}_r50_fpn_syncbn_1x' for block in (
    'nl_one_c4', 'snl_c3-c5', 'r16_se_c3-c5', 'r16_gcb_avg_mul_c3-c5')}
R50 = {path.stem for path in CONFIGS if '101' not in path.stem}
QUICK = R50 - ABLATION.keys() | {EVERYTHING, *OTHER_BLOCKS}
STEPS = [
    pytest.param(path, id=f'{path.parent.name}/{path.stem}',
                 marks=[] if path.stem in QUICK else pytest.mark.slow)
    for path in CONFIGS if not path.stem.endswith('_2x')]


@pytest.mark.parametrize('path', STEPS)
def test_one_step_and_one_prediction(path: Path) -> None:
    cfg = load_config(path, {'model.backbone.pretrained': None})
    model = MODELS.build(cfg.model)
    shape = (64, 96)
    masks = torch.zeros(1, *shape, dtype=torch.uint8)
    masks[:, 8:48, 8:56] = 1
    sample = DataSample(img_id=1, img_path='', ori_shape=shape, img_shape=shape, masks=crop_masks(masks),
                        boxes=torch.tensor([[8., 8., 56., 48.]]), labels=torch.tensor([3]))
    batch = dict(inputs=[torch.randint(0, 255, (3, *shape), dtype=torch.uint8) for _ in range(2)],
                 data_samples=[sample, sample])
    losses = model.train()(**model.data_preprocessor(batch, True), mode='loss')
    stages = [f's{i}.' for i in range(3)] if 'cascade' in path.stem else ['']
    parts = ['loss_cls', 'loss_bbox', 'acc'] + ['loss_mask'] * ('mask_rcnn' in path.stem)
    assert losses.keys() == {'loss_rpn_cls', 'loss_rpn_bbox'} | {s + part for s in stages for part in parts}
    sum(loss for name, loss in losses.items() if 'loss' in name).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.isfinite().all()) == p.requires_grad, name
    with torch.no_grad():
        results = model.eval().test_step(batch)
    assert [r['img_id'] for r in results] == [1, 1]
    assert all(('masks' in r) == ('mask_rcnn' in path.stem) for r in results)
