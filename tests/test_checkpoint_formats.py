"""Checkpoints from elsewhere come out with our names and order of classes: mmdetection of 2019, 2.x, 3.x."""

import json
import logging
import re
import runpy
import zlib
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet import checkpoint as ckpt
from mmdet.registry import MODELS
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path.stem: path for path in (ROOT / 'configs').glob('*/*.py')}
no_values = pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
GCNET = sorted(name for name, path in CONFIGS.items() if path.parent.name == 'gcnet')


@cache
def build(name: str) -> nn.Module:
    """The model of a config, without memory."""
    with torch.device('meta'):
        return MODELS.build(load_config(CONFIGS[name]).model)


def numbered(name: str, shape: list[int]) -> Tensor:
    """Values that tell the tensor by its name and the row, of one number a row in memory."""
    start = zlib.crc32(name.encode()) % 2**20  # exact in float32, with 324 rows
    if not shape:
        return torch.tensor(start)
    rows = torch.arange(start, start + shape[0], dtype=torch.float32)
    return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def rows(tensor: Tensor, name: str) -> list[int]:
    """The rows of ``numbered(name, ...)`` that a tensor consists of."""
    columns = tensor.reshape(len(tensor), -1)
    assert bool((columns == columns[:, :1]).all())
    return (columns[:, 0].long() - zlib.crc32(name.encode()) % 2**20).tolist()


def published(path: Path) -> OrderedDict[str, Tensor]:
    return OrderedDict((name, numbered(name, shape)) for name, shape in json.loads(path.read_text()).items())


def save_2019(weights: OrderedDict[str, Tensor], path: Path) -> None:
    """As mmcv wrote it: a pickle, no zip file, with the class names of that time."""
    meta = dict(epoch=12, iter=87960, mmcv_version='0.2.8', mmdet_version='0.6.0+01e2d71', config='model = 1',
                time='Sun Jun  2 08:08:08 2019', CLASSES=('person', 'traffic_light'))
    weights._metadata = OrderedDict({'': dict(version=1)})
    torch.save(dict(meta=meta, state_dict=weights, optimizer=dict(state={}, param_groups=[])), path,
               _use_new_zipfile_serialization=False)


def name_of_2019(name: str) -> str:
    return name.removeprefix('roi_head.').replace('conv2.conv_offset', 'conv2_offset')


@no_values
@pytest.mark.shared('published_keys')
@pytest.mark.parametrize('name', GCNET)
def test_published_weights_of_2019(name: str, shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / 'published_keys'
    old = published(next(path for path in folder.glob('*.json')
                         if path.stem.replace('4conv1f_', '4conv1fc_') == name))
    save_2019(old, tmp_path / 'old.pth')

    content = ckpt.load_file(tmp_path / 'old.pth')

    ckpt.load_weights(build(name), content['state_dict'], name)  # strict: nothing is missing or left over
    new = content['state_dict']
    assert content['meta']['legacy_2019'] is True
    assert content['meta']['dataset_meta'] == dict(classes=('person', 'traffic light'))
    assert 'optimizer' not in content
    assert len(new) == len(old)
    agnostic = name.startswith('cascade')
    for key, value in new.items():
        origin = name_of_2019(key)
        if '.fc_cls.' in key:
            assert rows(value, origin) == [*range(1, 81), 0]
        elif '.fc_reg.' in key:
            assert rows(value, origin) == ([0, 1, 2, 3] if agnostic else list(range(4, 324)))
        elif '.conv_logits.' in key:
            assert rows(value, origin) == list(range(1, 81))
        else:
            assert torch.equal(value, old[origin])


@no_values
@pytest.mark.shared('published_keys/mmdet3')
def test_published_weights_of_mmdetection_3(shared_dir: Path, tmp_path: Path) -> None:
    files = sorted((shared_dir / 'published_keys' / 'mmdet3').glob('*.json'))
    loaded = set()
    for path in files:
        old = published(path)
        model = our_name(path.stem)
        weights = {f'module.{key}': value for key, value in old.items()}
        weights |= {'data_preprocessor.mean': torch.zeros(3, 1, 1)}
        weights |= {'ema_backbone_conv1_weight': torch.zeros(1)}
        torch.save(dict(meta=dict(mmengine_version='0.7', epoch=12), state_dict=weights), tmp_path / 'e.pth')
        content = ckpt.load_file(tmp_path / 'e.pth')
        ckpt.load_weights(build(model), content['state_dict'], model)
        assert content['state_dict'].keys() == old.keys()
        assert all(torch.equal(value, old[key]) for key, value in content['state_dict'].items())
        assert 'legacy_2019' not in content['meta']
        loaded.add(model)
    assert len(loaded) == len(files)


def our_name(name: str) -> str:
    """Our config for mmdetection 3's, e.g. for mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco."""
    ratio = re.search(r'r(16|4)-gcb|gcb-r(16|4)', name)
    ours = 'cascade_' if name.startswith('cascade') else ''
    ours += 'mask_rcnn_' if 'mask' in name else 'faster_rcnn_' if 'faster' in name else 'rcnn_'
    dcn = 'dconv_' if 'dconv' in name else ''
    if ratio:
        ours += f'r{ratio[1] or ratio[2]}_gcb_{dcn}c3-c5_'
    elif dcn:
        ours += 'dconv_c3-c5_'
    ours += re.search(r'r50|r101|x101', name)[0].replace('x101', 'x101_32x4d') + '_fpn_'
    return ours + ('syncbn_' if 'syncbn' in name else '') + ('2x' if '_2x_' in name else '1x')


@pytest.mark.shared('published_keys', 'golden_2019')
def test_the_values_of_2019_arrive_in_the_model(shared_dir: Path, tmp_path: Path) -> None:
    name = 'mask_rcnn_r50_fpn_1x'
    shapes = json.loads((shared_dir / 'published_keys' / f'{name}.json').read_text())
    golden = runpy.run_path(str(shared_dir / 'golden_2019' / 'detweights.py'))['det_tensor']
    heads = {key: shape for key, shape in shapes.items() if 'fcs' not in key and 'layer4' not in key}
    old = OrderedDict((key, torch.from_numpy(golden(key, shape))) for key, shape in heads.items())
    save_2019(old, tmp_path / 'old.pth')
    model = MODELS.build(load_config(CONFIGS[name], {'model.backbone.pretrained': None}).model)

    content = ckpt.load_file(tmp_path / 'old.pth')
    ckpt.load_weights(model, content['state_dict'], 'old.pth', strict=False)

    assert content['meta']['legacy_2019'] and content['meta']['epoch'] == 12
    box, mask = model.roi_head.bbox_head, model.roi_head.mask_head
    assert torch.equal(box.fc_cls.weight[:80], old['bbox_head.fc_cls.weight'][1:])
    assert torch.equal(box.fc_cls.bias[80], old['bbox_head.fc_cls.bias'][0])
    assert torch.equal(box.fc_reg.weight.view(80, 4, -1), old['bbox_head.fc_reg.weight'].view(81, 4, -1)[1:])
    assert torch.equal(mask.conv_logits.bias, old['mask_head.conv_logits.bias'][1:])
    assert torch.equal(model.backbone.layer3[5].conv2.weight, old['backbone.layer3.5.conv2.weight'])
    assert torch.equal(model.rpn_head.rpn_cls.weight, old['rpn_head.rpn_cls.weight'])


@pytest.mark.parametrize('classes', [1, 2, 3, 20])
@pytest.mark.parametrize('agnostic', [False, True])
def test_other_numbers_of_classes(classes: int, agnostic: bool) -> None:
    sizes = {'fc_cls': classes + 1, 'fc_reg': 4 if agnostic else 4 * classes + 4}
    old = {f'bbox_head.1.{layer}.bias': torch.arange(size) for layer, size in sizes.items()}
    old['mask_head.1.conv_logits.bias'] = torch.arange(1 if agnostic else classes + 1)
    new = {name.split('.')[-2]: value.tolist() for name, value in ckpt.convert_2019(old).items()}
    assert new['fc_cls'] == [*range(1, classes + 1), 0]
    assert new['fc_reg'] == ([0, 1, 2, 3] if agnostic else list(range(4, 4 * classes + 4)))
    assert new['conv_logits'] == ([0] if agnostic else list(range(1, classes + 1)))


HEADS = {'bbox_head.fc_cls.bias': torch.zeros(3), 'mask_head.conv_logits.bias': torch.zeros(3)}
ROI_HEAD = {'roi_head.bbox_head.fc_cls.bias': torch.zeros(3)}


@pytest.mark.parametrize(
    'weights, meta, expected',
    [
        (HEADS, {}, '2019 format (mmdetection 0.x and 1.x): names are converted, background goes last'),
        ({f'module.{name}': value for name, value in HEADS.items()}, dict(mmcv_version='0.2'), '2019 format'),
        (ROI_HEAD, dict(mmcv_version='1.3'), 'mmdetection 2.x'),
        (ROI_HEAD, dict(mmengine_version='0.7'), 'mmdetection 3.x'),
        (ROI_HEAD, None, 'mmdetection 2.x or 3.x'),
        (ROI_HEAD, dict(mmengine_version='0.10', mmdet_version='1'), 'of this project'),
        (ROI_HEAD, dict(legacy_2019=True), 'of this project, with the numerics of 2019'),
        (dict.fromkeys(['conv1.weight', 'layer1.0.conv1.weight'], torch.ones(1)), None, 'ImageNet backbone'),
        ({'bbox_head.retina_cls.bias': torch.ones(3)}, {}, 'a state dict of names that are taken as they'),
    ],
)
def test_one_line_says_what_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict, meta: dict | None, expected: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [handler := logging.NullHandler()])
    monkeypatch.setattr(handler, 'handle', lambda record: lines.append(record.getMessage()))
    path = tmp_path / 'e.pth'
    torch.save(weights if meta is None else dict(state_dict=weights, meta=meta), path)
    content = ckpt.load_file(path)
    assert ckpt.load_meta(path) == content['meta']
    assert len(lines) == 1
    assert lines[0].startswith(f'{path} is recognised: {expected}')
    legacy = expected.startswith('2019') or (meta or {}).get('legacy_2019')
    assert bool(content['meta'].get('legacy_2019')) == bool(legacy)


@pytest.mark.parametrize(
    'meta', [dict(CLASSES=['a_b', 'c']), dict(dataset_meta=dict(CLASSES=('a_b', 'c'), palette=[1]))]
)
def test_names_of_classes_are_where_mmdetection_3_has_them(tmp_path: Path, meta: dict) -> None:
    torch.save(dict(state_dict=ROI_HEAD, meta=meta), tmp_path / 'e.pth')
    assert ckpt.load_file(tmp_path / 'e.pth')['meta']['dataset_meta']['classes'] == ('a_b', 'c')


@pytest.mark.parametrize('meta, names', [
    (dict(CLASSES='balloon'), ('balloon',)),
    (dict(dataset_meta=dict(classes='balloon')), ('balloon',)),
    (dict(dataset_meta=dict(classes=np.array(['a', 'b']))), ('a', 'b')),
    (dict(CLASSES=[b'a', b'b'], dataset_meta=[]), ('a', 'b')),
    (dict(CLASSES=[0, 1]), ('0', '1')),
    (dict(CLASSES=80, dataset_meta=dict(classes=['a'])), ('a',)),
    (dict(CLASSES={10: 'c', 2: 'b', 0: 'a'}), ('a', 'b', 'c')),
    (dict(CLASSES={'b': 1, 'a': 0}), ('a', 'b')),
    (dict(CLASSES=['a'], dataset_meta=dict(CLASSES=['b'], classes=['c'])), ('a',)),
    (dict(CLASSES=np.array('a')), ('a',)),
    (dict(legacy_2019=True, dataset_meta=dict(classes=('my_class',))), ('my_class',)),
    (dict(CLASSES=None), None),
])
def test_odd_forms_of_names(meta: dict, names: tuple | None) -> None:
    found = ckpt._with_classes(meta).get('dataset_meta', {})
    assert found == ({} if names is None else dict(classes=names))


def test_an_old_batch_norm_has_no_count_of_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    weights = {name: value + 3 for name, value in model.state_dict().items() if 'num_batches' not in name}
    ckpt.load_weights(model, weights, 'old.pth')
    assert model[0].running_mean.tolist() == [3, 3] and model[0].num_batches_tracked == 0


def test_without_strict_what_differs_is_logged_in_full(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    weights = {'0.weight': torch.ones(2, 2), '1.weight': torch.ones(3, 2), 'x.y': torch.ones(1)}
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        ckpt.load_weights(model, weights, 'e.pth', strict=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == [
        'e.pth does not fit the model: 2 of 4 names missing, 1 unknown, 1 of another shape\n'
        '  missing in the file:\n    0.bias\n    1.bias\n  unknown to the model:\n    x.y\n'
        '  of another shape:\n    1.weight: (3, 2) in the file, (1, 2) in the model'
    ]
    assert model[0].weight.tolist() == [[1, 1], [1, 1]]
