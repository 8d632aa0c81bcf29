import inspect
from pathlib import Path
from typing import Literal, Required, TypedDict

import pytest
from mmengine.runner import Runner
from torch import nn

from mmdet.registry import MODELS, TASK_UTILS
from mmdet.utils.config import load_config
from mmdet.utils.config_check import ConfigError, check_config
from mmdet.utils.config_schema import RUNNER_KEYS

CONFIGS = Path(__file__).parents[2] / 'configs'
R50 = CONFIGS / 'gcnet' / 'mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py'
ALL_CONFIGS = [path for path in sorted(CONFIGS.rglob('*.py')) if '_base_' not in path.parts]


class ToyNorm(TypedDict, total=False):
    type: Required[Literal['BN', 'SyncBN']]
    eps: float


class ToyTrain(TypedDict, total=False):
    coder: dict
    sizes: tuple[int, int]
    norms: list[ToyNorm]


class ToyPart(nn.Module):
    def __init__(
        self, depth: int, norm: ToyNorm | None = None, ratio: float = 0.5, names: list[str] | str = ()
    ):
        super().__init__()


class ToyWhole(nn.Module):
    def __init__(self, part: dict, train_cfg: ToyTrain | None = None, parts: list[dict] | None = None):
        super().__init__()


class ToyChild(ToyPart):
    def __init__(self, extra: int = 0, **kwargs):
        super().__init__(**kwargs)


def toy_coder(scale: float = 1.0) -> float:
    return scale


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for toy in (ToyPart, ToyWhole, ToyChild):
        monkeypatch.setitem(MODELS.module_dict, toy.__name__, toy)
    monkeypatch.setitem(TASK_UTILS.module_dict, 'toy_coder', toy_coder)


def problems(**cfg: object) -> list[str]:
    """What check_config says, without the summary line and the file's name."""
    try:
        check_config(cfg, 'x.py')
    except ConfigError as error:
        lines = str(error).split('\n')
        if len(lines) > 1:
            assert lines.pop(0) == f'x.py: {len(lines)} problems'
        assert all(line.startswith('x.py: ') for line in lines)
        return [line.removeprefix('x.py: ') for line in lines]
    return []


def toy(**keys: object) -> dict:
    return dict(type='ToyWhole', part=dict(type='ToyPart', depth=1), **keys)


@pytest.mark.parametrize('path', ALL_CONFIGS, ids=lambda path: path.stem)
def test_every_config_passes(path: Path) -> None:
    family = path.stem.split('_rcnn')[0].split('_')[0]
    expected = dict(mask='MaskRCNN', faster='FasterRCNN', cascade='CascadeRCNN')[family]
    assert load_config(path).model.type == expected


def test_schema_knows_every_key_of_the_runner() -> None:
    arguments = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
    assert arguments <= RUNNER_KEYS.keys()


@pytest.mark.parametrize(
    'model, expected',
    [
        (dict(type='ToyPart', depth=1, norm=dict(type='BN', eps=1)), []),
        (dict(type='ToyPart', depth=1, norm=None, ratio=1, names='x'), []),
        (dict(type='ToyPart', dpeth=1), ["model.dpeth: unknown argument of ToyPart; did you mean 'depth'?"]),
        (dict(type='ToyPart'), ['model.depth: missing; it is a required argument of ToyPart']),
        (dict(type='ToyPrat', depth=1), ["model.type: 'ToyPrat' is not registered; did you mean 'ToyPart'?"]),
        (dict(type='CocoDataset', ann_file='x'), ["model.type: 'CocoDataset' is not registered; "]),
        (dict(typ='ToyPart', depth=1), ["model.typ: unknown key; did you mean 'type'?"]),
        (dict(type='ToyPart', depth='fifty'), ["model.depth: expected int, got 'fifty'"]),
        (dict(type='ToyPart', depth=1, names=[3]), ['model.names[0]: expected str, got 3']),
        (
            dict(type='ToyPart', depth=1, norm=dict(type='SyncBn')),
            ["model.norm.type: 'SyncBn' is unknown; did you mean 'SyncBN'?"],
        ),
        (
            dict(type='ToyPart', depth=1, norm=dict(type='BN', esp=1)),
            ["model.norm.esp: unknown key; did you mean 'eps'?"],
        ),
        (dict(type='ToyPart', depth=1, norm=dict(eps=1)), ['model.norm.type: missing; it is a required key']),
        (dict(type='ToyPart', depth=1, norm='BN'), ["model.norm: expected a dict or None, got 'BN'"]),
        (
            dict(type='ToyPart', depth=1, zzz=1),
            ['model.zzz: unknown argument of ToyPart; known: depth, names, norm, ratio; '
             '_delete_=True drops what a base sets'],
        ),
        (dict(type='ToyChild', depth=1, extra=1), []),
        (
            dict(type='ToyChild', dept=1, extra=1),
            ["model.dept: unknown argument of ToyChild; did you mean 'depth'?"],
        ),
        (
            dict(type=ToyPart, depth=1, ratios=2),
            ["model.ratios: unknown argument of ToyPart; did you mean 'ratio'?"],
        ),
        ('ToyPart', ["model: expected a dict with a type, got 'ToyPart'"]),
    ],
)
def test_arguments_of_a_model(model: object, expected: list[str]) -> None:
    found = problems(model=model)
    assert len(found) == len(expected)
    assert all(a.startswith(b) for a, b in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    'keys, expected',
    [
        (dict(train_cfg=dict(coder=dict(type='toy_coder', scale=2), sizes=[1, 2])), None),
        (
            dict(train_cfg=dict(coder=dict(type='toy_coder', scael=2))),
            "model.train_cfg.coder.scael: unknown argument of toy_coder; did you mean 'scale'?",
        ),
        (
            dict(train_cfg=dict(codr=dict(type='toy_coder'))),
            "model.train_cfg.codr: unknown key; did you mean 'coder'?",
        ),
        (
            dict(train_cfg=dict(coder=dict(scale=2))),
            'model.train_cfg.coder.type: missing; the dict has only scale',
        ),
        (dict(train_cfg=dict(sizes=(1, 2, 3))), 'model.train_cfg.sizes: expected 2 values, got (1, 2, 3)'),
        (
            dict(train_cfg=dict(norms=[dict(type='BN'), dict(type='BM')])),
            "model.train_cfg.norms[1].type: 'BM' is unknown; did you mean 'BN'?",
        ),
        (
            dict(parts=[dict(type='ToyPart', depth=1), dict(type='ToyPart', depth=1, ratoi=1)]),
            "model.parts[1].ratoi: unknown argument of ToyPart; did you mean 'ratio'?",
        ),
    ],
)
def test_nested_dicts(keys: dict, expected: str | None) -> None:
    assert problems(model=toy(**keys)) == ([expected] if expected else [])


@pytest.mark.parametrize('kind, instead', [
    ('RandomResize', "did you mean 'RandomChoiceResize'?"),
    ('Normalize', 'model.data_preprocessor does that')])
def test_transforms_of_mmcv_would_leave_boxes_as_they_are(kind: str, instead: str) -> None:
    pipeline = [dict(type=kind), dict(type='RandomApply', transforms=[dict(type='RandomFlip')]),
                dict(type='RandomGrayscale', prob=0.5, keep_channels=True)]
    found = problems(train_dataloader=dict(dataset=dict(type='CocoDataset', ann_file='a', pipeline=pipeline)))
    assert found == [
        f'train_dataloader.dataset.pipeline[0].type: {kind!r} is not registered; {instead}']


def test_all_problems_are_reported() -> None:
    found = problems(model=toy(prat=1, train_cfg=dict(zise=1)), modle=1, randomness=dict(sed=1))
    assert [line.split(': ')[0] for line in found] == [
        'model.prat',
        'model.train_cfg.zise',
        'modle',
        'randomness.sed',
    ]


@pytest.mark.parametrize(
    'key, expected',
    [
        ('modle', 'model'),
        ('optim_wraper', 'optim_wrapper'),
        ('train_datloader', 'train_dataloader'),
        ('default_hook', 'default_hooks'),
        ('param_schedulers', 'param_scheduler'),
        ('work_dirs', 'work_dir'),
        ('val_pipeline', None),
        ('train_pipeline', None),
        ('test_pipeline', None),
        ('data_root', None),
        ('num_classes', None),
        ('max_epochs', None),
        ('train_dataset', None),
        ('vis_backends', None),
        ('norm_cfg', None),
        ('base_lr', None),
        ('backend_args', None),
        ('metainfo', None),
    ],
)
def test_top_level_names(key: str, expected: str | None) -> None:
    assert problems(**{key: 1}) == (
        [f'{key}: unknown top-level key; did you mean {expected!r}?'] if expected else []
    )


@pytest.mark.parametrize(
    'option, expected',
    [
        (
            'model.backbone.dpeth=18',
            "model.backbone.dpeth: unknown argument of ResNet; did you mean 'depth'?",
        ),
        ('model.backbon.depth=18', "model.backbon: unknown argument of MaskRCNN; did you mean 'backbone'?"),
        ('model.backbone.gcb.ratoi=1', "model.backbone.gcb.ratoi: unknown key; did you mean 'ratio'?"),
        (
            'model.backbone.norm_cfg.type=SyncBn',
            "model.backbone.norm_cfg.type: 'SyncBn' is unknown; did you mean 'SyncBN'?",
        ),
        (
            'model.train_cfg.rpn.assigner.pos_iou_tr=1',
            'model.train_cfg.rpn.assigner.pos_iou_tr: unknown argument of MaxIoUAssigner; '
            "did you mean 'pos_iou_thr'?",
        ),
        (
            'train_dataloader.dataset.pipeline.2.scael=(256,256)',
            "train_dataloader.dataset.pipeline[2].scael: unknown argument of Resize; did you mean 'scale'?",
        ),
        (
            'train_dataloader.dataset.pipeline.9.scale=(256,256)',
            'train_dataloader.dataset.pipeline.9: train_dataloader.'
            'dataset.pipeline is a list of 5, with indices 0 to 4',
        ),
        (
            'train_dataloader.bacth_size=2',
            "train_dataloader.bacth_size: unknown argument of DataLoader; did you mean 'batch_size'?",
        ),
        (
            'train_dataloader.sampler.type=DefaultSamplr',
            "train_dataloader.sampler.type: 'DefaultSamplr' is not "
            "registered; did you mean 'DefaultSampler'?",
        ),
        (
            'train_cfg.max_epoch=1',
            "train_cfg.max_epoch: unknown argument of EpochBasedTrainLoop; did you mean 'max_epochs'?",
        ),
        (
            'optim_wrapper.optimizer.momentun=0.9',
            "optim_wrapper.optimizer.momentun: unknown argument of SGD; did you mean 'momentum'?",
        ),
        (
            'optim_wrapper.optimizer.type=SDG',
            "optim_wrapper.optimizer.type: 'SDG' is not registered; did you mean 'SGD'?",
        ),
        (
            'optim_wrapper.clip_grad.maxnorm=35',
            "optim_wrapper.clip_grad.maxnorm: unknown key; did you mean 'max_norm'?",
        ),
        (
            'param_scheduler.1.gama=0.5',
            "param_scheduler[1].gama: unknown argument of MultiStepLR; did you mean 'gamma'?",
        ),
        (
            'default_hooks.checkpoint.intervall=2',
            'default_hooks.checkpoint.intervall: unknown argument of CheckpointHook; '
            "did you mean 'interval'?",
        ),
        (
            'default_hooks.chekpoint.interval=2',
            "default_hooks.chekpoint: unknown key; did you mean 'checkpoint'?",
        ),
        (
            'val_evaluator.metrc=bbox',
            "val_evaluator.metrc: unknown argument of CocoMetric; did you mean 'metric'?",
        ),
        ('env_cfg.dist_cfg.bakend=gloo', "env_cfg.dist_cfg.bakend: unknown key; did you mean 'backend'?"),
        (
            'auto_scale_lr.base_batchsize=8',
            "auto_scale_lr.base_batchsize: unknown key; did you mean 'base_batch_size'?",
        ),
        (
            'log_processor.window_sise=8',
            "log_processor.window_sise: unknown argument of LogProcessor; did you mean 'window_size'?",
        ),
        ('modle.type=x', "modle: unknown top-level key; did you mean 'model'?"),
        (
            'model.type.x=1',
            "model.type: a dict cannot be merged over 'MaskRCNN'; give the whole value, "
            'or _delete_=True in the dict to replace it',
        ),
        ('foo=1', 'foo: no such key to set'),
    ],
)
def test_options_are_checked(option: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(R50, dict([option.split('=')]))
    assert str(error.value) == f'{R50}: {expected}'


@pytest.mark.parametrize('key, value, expected', [
    ('optim_wrapper.optimizer.lr', 'abc', "optimizer.lr: expected a number from 0 on, got 'abc'"),
    ('optim_wrapper.optimizer.lr', None, 'optim_wrapper.optimizer.lr: expected a number from 0 on, got None'),
    ('optim_wrapper.accumulative_counts', 1.5, 'counts: expected a whole number from 1 on, got 1.5'),
    ('train_cfg.max_epochs', 0, 'train_cfg.max_epochs: expected a whole number from 1 on, got 0'),
    ('val_dataloader.batch_size', 0, 'val_dataloader.batch_size: expected a whole number from 1 on, got 0'),
    ('test_dataloader.num_workers', -1, 'num_workers: expected a whole number from 0 on, got -1'),
    ('efficient_conv_bn_eval', 'backbone', "efficient_conv_bn_eval: expected None, got 'backbone'"),
    ('activation_checkpointing', 'backbone', "activation_checkpointing: expected None, got 'backbone'")])
def test_numbers_have_a_least_value(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(R50, {key: value})
    assert expected in str(error.value)
