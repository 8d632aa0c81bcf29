"""The order of the imports, the size of files, the depth of classes, and what a reader has to follow."""
import ast
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

from mmdet.registry import MODELS
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import crop_masks
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'mmdet'
MAX_LINES = 350

# What each part of mmdet may import from the package, itself left out. Data flows the other way.
BASE = {'registry', 'structures', 'ops'}
PARTS = {
    'ops': {'_C'},
    'registry': set(),
    'structures': {'ops'},
    'checkpoint': BASE | {'checkpoint_files'},
    'checkpoint_files': BASE | {'utils'},
    'legacy_2019': BASE | {'datasets', 'models'},
    'models': BASE | {'checkpoint'},
    'datasets': BASE | {'utils'},
    'evaluation': BASE | {'utils'},
    'visualization': BASE,
    'utils': BASE | {'_C'},
}
PARTS['engine'] = set(PARTS) | {'models', 'datasets', 'evaluation', 'visualization'}
PARTS['apis'] = set(PARTS)

# And within mmdet.models.
MODEL_PARTS = {
    'losses': set(),
    'layers': set(),
    'data_preprocessor': set(),
    'train_test_cfg': set(),
    'task_modules': set(),
    'backbones': {'layers'},
    'necks': {'layers'},
    'dense_heads': {'layers', 'task_modules', 'losses', 'train_test_cfg'},
    'roi_heads': {'layers', 'task_modules', 'losses', 'train_test_cfg'},
    'detectors': {'task_modules', 'train_test_cfg'},
}

# Test files that hold something else than one file of the package.
GENERAL_TESTS = {
    'test_architecture', 'test_checkpoint_formats', 'test_configs', 'test_conftest', 'test_end_to_end',
    'test_defaults', 'test_install',
}

MODULES = sorted(PACKAGE.rglob('*.py'))
SUFFIXES = {'.py', '.cpp', '.cu', '.cuh', '.h', '.sh'}
SOURCES = sorted(path for folder in ('mmdet', 'tools', 'tests', 'configs', 'benchmarks')
                 for path in (ROOT / folder).rglob('*') if path.suffix in SUFFIXES)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file of the package imports when it runs, also inside functions."""
    package = module_name(path).split('.')
    if path.name != '__init__.py':
        package = package[:-1]
    tree = ast.parse(path.read_text())
    typing_only = {inner for node in ast.walk(tree) if isinstance(node, ast.If)
                   and ast.unparse(node.test) == 'TYPE_CHECKING' for inner in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else []
            origin = '.'.join([*start, *([node.module] if node.module else [])])
            names |= {f'{origin}.{alias.name}' for alias in node.names}
    return names


def breaches(path: Path, root: str, allowed: dict[str, set[str]]) -> list[str]:
    """Imports of a file below `root` that the table does not allow its part."""
    depth = root.count('.') + 1
    name = module_name(path).split('.')
    if len(name) <= depth:
        return []  # the package's own __init__ gathers its parts
    part = name[depth]
    assert part in allowed, f'say in {Path(__file__).name} what {root}.{part} may import'
    found = [imported for imported in imports(path) if imported.startswith(f'{root}.')]
    return [imported for imported in found if imported.split('.')[depth] not in allowed[part] | {part}
            and imported != 'mmdet.__version__']


@pytest.mark.parametrize('path', MODULES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    assert breaches(path, 'mmdet', PARTS) == []
    if path.is_relative_to(PACKAGE / 'models'):
        assert breaches(path, 'mmdet.models', MODEL_PARTS) == []


def test_a_breach_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    path = tmp_path / 'mmdet' / 'structures' / 'boxes.py'
    path.parent.mkdir(parents=True)
    path.write_text('import torch\nfrom ..ops import nms\n'
                    'def f():\n    from ..engine.runner import R\n    from .masks import m\n')
    assert imports(path) == {'torch', 'mmdet.ops.nms', 'mmdet.engine.runner.R', 'mmdet.structures.masks.m'}
    assert breaches(path, 'mmdet', PARTS) == ['mmdet.engine.runner.R']


@pytest.mark.parametrize('path', [path for path in MODULES if 'ops' in path.parts], ids=module_name)
def test_ops_need_torch_alone(path: Path) -> None:
    libraries = {name.split('.')[0] for name in imports(path)}
    assert libraries & {'mmengine', 'mmcv', 'cv2', 'numpy', 'torchvision'} == set()


@pytest.mark.parametrize('path', MODULES, ids=module_name)
def test_no_star_imports(path: Path) -> None:
    assert not [name for name in imports(path) if name.endswith('.*')]


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in SOURCES
            if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}, f'no file has more than {MAX_LINES} lines: move a thing of its own into its own file'


def test_classes_are_flat() -> None:
    """At most one class of the project stands above another one."""
    bases = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names = [ast.unparse(base).split('.')[-1] for base in node.bases]
                bases[node.name] = [name for name in names if name != node.name]  # a library's namesake

    def above(name: str) -> list[str]:
        return [up for base in bases.get(name, ()) if base in bases for up in (base, *above(base))]

    assert {name: found for name in bases if len(found := above(name)) > 1} == {}


@pytest.mark.parametrize('path', sorted((ROOT / 'tests').rglob('test_*.py')),
                         ids=lambda path: str(path.relative_to(ROOT / 'tests').with_suffix('')))
def test_tests_mirror_the_package(path: Path) -> None:
    relative = path.relative_to(ROOT / 'tests')
    if len(relative.parts) == 1 and path.stem in GENERAL_TESTS:
        return
    name = path.stem.removeprefix('test_')
    homes = [PACKAGE / relative.parent, ROOT / relative.parent]
    names = [f'{mark}{name}{suffix}' for mark in ('', '_') for suffix in ('.py', '.cpp', '.h', '.sh', '')]
    assert any((home / file).exists() for home in homes for file in names), (
        f'tests/{relative} mirrors no file: it would be mmdet/{relative.parent / name}.py')


def test_a_training_step_is_quickly_read() -> None:
    """Who follows one step of Mask R-CNN with GC blocks reads at most 24 files and 100 functions."""
    cfg = load_config(ROOT / 'configs' / 'gcnet' / 'mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py')
    model = MODELS.build(cfg.model).train()
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    sample = DataSample(img_id=1, img_path='', ori_shape=(64, 96), img_shape=(64, 96),
                        masks=crop_masks(masks), boxes=torch.tensor([[8., 8., 40., 40.]]),
                        labels=torch.tensor([1]))
    batch = dict(inputs=[torch.zeros(3, 64, 96, dtype=torch.uint8)] * 2, data_samples=[sample, sample])
    ran = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if Path(code.co_filename).is_relative_to(PACKAGE) and not code.co_name.startswith('<'):
            ran.add((code.co_filename, code.co_qualname))

    before = sys.gettrace()
    sys.settrace(record)
    try:
        losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    finally:
        sys.settrace(before)
    assert 'loss_mask' in losses
    files = {file for file, _ in ran}
    assert 10 < len(files) <= 24, sorted(files)
    assert 30 < len(ran) <= 100, sorted(ran)
