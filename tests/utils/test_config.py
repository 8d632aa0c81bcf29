import argparse
from pathlib import Path

import pytest

from mmdet.utils.cfg_options import CfgOptions
from mmdet.utils.config import ConfigError, load_config

CONFIGS = Path(__file__).parents[2] / 'configs'
R50 = CONFIGS / 'gcnet' / 'mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py'


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding='utf-8')
    return str(path)


def message(path: object, options: dict | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, options)  # type: ignore[arg-type]
    assert str(error.value).startswith(f'{path}: ')
    return str(error.value).removeprefix(f'{path}: ')


@pytest.mark.parametrize(
    'options, get, expected',
    [
        (['model.backbone.pretrained=None'], lambda c: c.model.backbone.pretrained, None),
        (
            ['train_dataloader.dataset.pipeline.2.scale=(256,256)'],
            lambda c: c.train_dataloader.dataset.pipeline[2].scale,
            (256, 256),
        ),
        (['param_scheduler.1.milestones.0=6'], lambda c: c.param_scheduler[1].milestones, [6, 11]),
        (['model.backbone.stage_with_gcb.0=True'], lambda c: c.model.backbone.stage_with_gcb, (True,) * 4),
        (
            ['model.backbone.gcb._delete_=True', 'model.backbone.gcb.ratio=0.5'],
            lambda c: c.model.backbone.gcb,
            dict(ratio=0.5),
        ),
        (['load_from=a b.pth', 'train_dataloader.dataset.indices=4'], lambda c: c.load_from, 'a b.pth'),
        (
            ['optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.loss_scale=512.'],
            lambda c: c.optim_wrapper.loss_scale,
            512,
        ),
        (
            ['data_root=d/', 'train_dataloader.dataset.data_root=d/'],
            lambda c: c.train_dataloader.dataset.data_root,
            'd/',
        ),
    ],
)
def test_options_are_merged(options: list[str], get: object, expected: object) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions)
    cfg = load_config(R50, parser.parse_args(['--cfg-options', *options]).cfg_options)
    assert get(cfg) == expected  # type: ignore[operator]


def test_options_over_none_and_leaf_over_none(tmp_path: Path) -> None:
    base = write(
        tmp_path / 'base.py', 'optim_wrapper = dict(optimizer=dict(type="SGD", lr=1.), clip_grad=None)'
    )
    assert load_config(base, {'optim_wrapper.clip_grad.max_norm': 3}).optim_wrapper.clip_grad == dict(
        max_norm=3
    )
    leaf = write(tmp_path / 'leaf.py', '_base_ = "base.py"\noptim_wrapper = dict(clip_grad=dict(max_norm=2))')
    assert load_config(leaf).optim_wrapper.clip_grad == dict(max_norm=2)
    assert load_config(leaf).optim_wrapper.optimizer.lr == 1


def test_a_dict_over_a_list_says_where(tmp_path: Path) -> None:
    write(tmp_path / 'base.py', 'param_scheduler = [dict(type="ConstantLR"), dict(type="ConstantLR")]')
    leaf = write(tmp_path / 'leaf.py', '_base_ = "base.py"\nparam_scheduler = dict(factor=0.5)')
    assert message(leaf).startswith('param_scheduler: a dict cannot be merged over a list of 2; ')


def test_a_dict_read_from_the_base_carries_no_scope(tmp_path: Path) -> None:
    leaf = write(
        tmp_path / 'leaf.py',
        f"""_base_ = {str(R50)!r}
val_dataloader = dict(dataset=dict(
    pipeline=_base_.train_pipeline,
    filter_cfg={{{{_base_.train_dataloader.dataset.filter_cfg}}}}))
""",
    )
    dataset = load_config(leaf).val_dataloader.dataset
    assert '_scope_' not in dataset.filter_cfg and not any('_scope_' in step for step in dataset.pipeline)


def test_classes_that_a_file_imports_are_no_values(tmp_path: Path) -> None:
    leaf = write(tmp_path / 'leaf.py', f"""_base_ = {str(R50)!r}
from pathlib import Path
work_dir = str(Path('a') / 'b')
""")
    cfg = load_config(leaf)
    assert cfg.work_dir == 'a/b' and 'Path' not in cfg
    assert "work_dir = 'a/b'" in cfg.pretty_text


def test_imports_by_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / 'mine.py', """from mmengine.hooks import Hook
from mmdet.registry import HOOKS
@HOOKS.register_module(name='HookOfAnOption')
class MyHook(Hook):
    pass
""")
    monkeypatch.syspath_prepend(tmp_path)
    options = {'custom_imports.imports': 'mine', 'custom_hooks': [dict(type='HookOfAnOption')]}
    assert load_config(R50, options).custom_hooks[0].type == 'HookOfAnOption'
    text = message(R50, {'custom_imports.imports': ['no_such_module']})
    assert text == "ImportError: Failed to import no_such_module"
    text = message(R50, {'custom_imports': 'mine'})
    assert text == "custom_imports='mine': give custom_imports.imports=[MODULE,...]"
    assert load_config(R50, {'custom_imports': None}).custom_imports is None


# A leaf over configs/_base_: what it redefines, and what that leads to.
PIPELINE = "[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]"


@pytest.mark.parametrize(
    'text, lost',
    [
        (
            f'train_pipeline = {PIPELINE}',
            "train_pipeline was redefined, but the base's value is still in "
            'train_dataloader.dataset.pipeline; '
            'set train_dataloader=dict(dataset=dict(pipeline=train_pipeline))',
        ),
        (
            f'train_pipeline = {PIPELINE}\ntrain_dataloader = dict(dataset=dict(pipeline=train_pipeline))',
            None,
        ),
        (f'train_pipeline = {PIPELINE}\ntrain_dataloader = dict(dataset=dict(pipeline={PIPELINE}))', None),
        (
            f'train_pipeline = {PIPELINE}\nsteps = train_pipeline[1:]\n'
            'train_dataloader = dict(dataset=dict(pipeline=steps))',
            None,
        ),
        ('size = (4, 4)\ntrain_pipeline = [dict(type="Resize", scale=size)]', 'train_pipeline was redefined'),
        (
            "data_root = 'mine/'",
            "data_root was redefined, but the base's value is still in train_dataloader.dataset.data_root, "
            'val_dataloader.dataset.data_root, test_dataloader.dataset.data_root; '
            'set train_dataloader=dict(dataset=dict(data_root=data_root))',
        ),
        ("data_root = 'mine/'\ntrain_dataloader = dict(dataset=dict(ann_file=data_root + 'a.json'))", None),
        ("data_root = 'data/coco/'", None),
        (
            "data_root = 'mine/'\nfor d in 'x':\n"
            '    train_dataloader = dict(dataset=dict(data_root=data_root))',
            None,
        ),
        ('val_pipeline = []', None),
    ],
)
def test_redefined_helper(text: str, lost: str | None, tmp_path: Path) -> None:
    bases = [str(CONFIGS / '_base_' / name) for name in ('datasets/coco_instance.py', 'default_runtime.py')]
    leaf = write(tmp_path / 'leaf.py', f'_base_ = {bases}\n{text}\n')
    if lost:
        assert message(leaf).startswith(lost)
    else:
        load_config(leaf)


def test_redefined_number(tmp_path: Path) -> None:
    write(
        tmp_path / 'base.py',
        'epochs = 12\nlast = 2\ntrain_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs)\n'
        'val_cfg = dict()\nauto_scale_lr = dict(base_batch_size=last * 8)',
    )
    leaf = tmp_path / 'leaf.py'
    # 16 is elsewhere in the config, by chance.
    assert message(write(leaf, '_base_ = "base.py"\nepochs = 16')) == (
        "epochs was redefined, but the base's value is still in train_cfg.max_epochs; "
        'set train_cfg=dict(max_epochs=epochs)'
    )
    assert message(write(leaf, '_base_ = "base.py"\nlast = 3')).startswith(
        'last was redefined, but what the base made'
    )
    load_config(write(leaf, '_base_ = "base.py"\nepochs = 16\ntrain_cfg = dict(max_epochs=epochs - 1)'))
    assert (
        load_config(write(leaf, '_base_ = "base.py"'), {'epochs': 3, 'train_cfg.max_epochs': 3}).epochs == 3
    )


def test_helper_redefined_by_option() -> None:
    assert message(R50, {'data_root': 'mine/'}) == (
        'data_root was redefined, but its old value, used when the file was read, is still in '
        'train_dataloader.dataset.data_root, val_dataloader.dataset.data_root, '
        'test_dataloader.dataset.data_root; '
        'set train_dataloader.dataset.data_root=...'
    )
    assert 'set train_dataloader.dataset.pipeline=...' in message(R50, {'train_pipeline.2.scale': (1, 2)})
    assert message(R50, {'data_rot': 'mine/'}) == "data_rot: no such key to set; did you mean 'data_root'?"


def test_helper_close_to_a_known_key_passes_if_it_is_used(tmp_path: Path) -> None:
    used = 'dataloader = dict(batch_size=2, dataset=dict(type="CocoDataset", ann_file="x"))\n'
    assert "did you mean 'val_dataloader'?" in message(write(tmp_path / 'a.py', used))
    load_config(write(tmp_path / 'b.py', used + 'train_dataloader = dict(**dataloader)'))


@pytest.mark.parametrize(
    'text, expected',
    [
        ('model = dict(', 'line 1: '),
        ('x = 1\ny = z', "line 2: NameError: name 'z' is not defined"),
        ('x = 1\ny = 1 / 0', 'line 2: ZeroDivisionError: '),
        ('_base_ = "leaf.py"', '_base_ of leaf.py leads back to itself'),
        ('_base_ = 5', '_base_ = 5: expected a path or a list of paths'),
        ('_base_ = "nothing.py"', "_base_ 'nothing.py' does not exist"),
        ('_base_ = "bsae.py"', "_base_ 'bsae.py' does not exist; did you mean "),
        (
            '_base_ = ["base.py", "base2.py"]',
            "KeyError: Duplicate key is not allowed among bases. Duplicate keys: {'x'}",
        ),
        ('_base_ = "broken.py"', 'broken.py, line 2: '),
        ('_base_ = "mid.py"', "_base_ 'gone.py' of mid.py does not exist"),
        (
            'custom_imports = dict(imports="no_such_module_x")',
            'ImportError: Failed to import custom modules from ',
        ),
    ],
)
def test_unreadable_file_is_one_line(text: str, expected: str, tmp_path: Path) -> None:
    for name, content in dict(
        base='x = 1', base2='x = 2', broken='x = 1\ny = [', mid='_base_ = "gone.py"'
    ).items():
        write(tmp_path / f'{name}.py', content)
    found = message(write(tmp_path / 'leaf.py', text))
    assert found.startswith(expected) and '\n' not in found


def test_missing_file_names_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (
        'mask_rcnn_r50_fpn_1',
        'configs/gcnett/mask_rcnn_r50_fpn_1x.py',
        CONFIGS / 'gcnet' / 'mask_rcnn_r50_fpn_1.py',
    ):
        with pytest.raises(
            FileNotFoundError, match=r'no such config file; did you mean .*gcnet/mask_rcnn_r50_fpn_1x\.py\?$'
        ):
            load_config(given)
    with pytest.raises(FileNotFoundError, match='is a folder'):
        load_config(tmp_path)


def test_all_kinds_of_problems_are_reported_together(tmp_path: Path) -> None:
    leaf = write(tmp_path / 'leaf.py', f'_base_ = {str(R50)!r}\ntrain_pipeline = []\nmodle = dict()\n')
    lines = message(leaf, {'model.backbone.dpeth': 18}).split('\n')
    keys = [line.removeprefix(f'{leaf}: ').split()[0] for line in lines]
    assert keys == ['3', 'train_pipeline', 'model.backbone.dpeth:', 'modle:']


@pytest.mark.parametrize('text, options', [
    ('optimizer = dict(lr=0.0025)\ntotal_epochs = 3\n', {}),
    ('', {'optimizer.lr': 0.0025, 'total_epochs': 3})])
def test_keys_of_older_mmdetection_are_named(tmp_path: Path, text: str, options: dict) -> None:
    (tmp_path / 'own.py').write_text(f"_base_ = '{R50}'\n{text}")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / 'own.py', options)
    assert str(error.value).splitlines()[1:] == [
        f'{tmp_path}/own.py: optimizer: a key of mmdetection 1.x and 2.x; here it is optim_wrapper.optimizer',
        f'{tmp_path}/own.py: total_epochs: a key of mmdetection 1.x and 2.x; here it is train_cfg.max_epochs']


def test_as_a_helper_variable_an_old_key_is_free(tmp_path: Path) -> None:
    text = f"_base_ = '{R50}'\noptimizer = dict(lr=0.0025)\noptim_wrapper = dict(optimizer=optimizer)\n"
    (tmp_path / 'own.py').write_text(text)
    (tmp_path / 'computed.py').write_text(f"_base_ = ['{tmp_path}/' + 'own.py']\n")
    for name in ('own.py', 'computed.py'):
        cfg = load_config(tmp_path / name)
        cfg.dump(tmp_path / 'dumped.py')
        assert load_config(tmp_path / 'dumped.py').optim_wrapper.optimizer.lr == 0.0025
