"""The tool that draws the synthetic data set, and the quick start's config that trains on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.dataset import pseudo_collate

from mmdet.datasets.synthetic import CLASSES
from mmdet.models.layers.context_block import ContextBlock
from mmdet.registry import DATASETS, MODELS
from mmdet.utils.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/quickstart/mask_rcnn_r4_gcb_c3-c5_r18_fpn_synthetic.py'


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)],
                          capture_output=True, text=True)


def test_flags(tmp_path: Path) -> None:
    done = run('make_synthetic.py', tmp_path, '--num-train', 3, '--num_val', 2, '--size', 128, '--seed', 7)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'Wrote 3 training and 2 validation images to {tmp_path}\n'
    images = json.loads((tmp_path / 'annotations/instances_train.json').read_text())['images']
    assert [(i['file_name'], i['width'], i['height']) for i in images] == [
        (f'{i:06d}.jpg', 128, 128) for i in (1, 2, 3)]
    assert len(list((tmp_path / 'val').iterdir())) == 2


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = run('make_synthetic.py', tmp_path, '--size', 32)
    assert done.returncode == 1
    assert done.stderr == 'error: size=32 is too small to draw the shapes clearly; take at least 96\n'
    (tmp_path / 'file').touch()
    done = run('make_synthetic.py', tmp_path / 'file')
    assert done.returncode == 1
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert str(tmp_path / 'file') in done.stderr


def test_config_trains_context_blocks(tmp_path: Path) -> None:
    assert run('make_synthetic.py', tmp_path, '--num_train', 4, '--num_val', 1).returncode == 0
    cfg = load_config(str(CONFIG), {'train_dataloader.dataset.data_root': str(tmp_path)})
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert dataset.metainfo['classes'] == CLASSES
    model = MODELS.build(cfg.model).train()
    blocks = [name for name, module in model.named_modules() if isinstance(module, ContextBlock)]
    assert blocks == [f'backbone.layer{i}.{j}.context_block' for i in (2, 3, 4) for j in (0, 1)]
    data = model.data_preprocessor(pseudo_collate([dataset[i] for i in range(4)]), training=True)
    losses = model(**data, mode='loss')
    total = sum(value for name, value in losses.items() if 'loss' in name)
    assert isinstance(total, torch.Tensor) and total.isfinite()
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.slow
def test_quick_start_reaches_its_goal(tmp_path: Path) -> None:
    """Trains for minutes: at least 0.45 box AP and 0.42 mask AP."""
    assert run('make_synthetic.py', tmp_path / 'data').returncode == 0
    roots = [f'{part}_dataloader.dataset.data_root={tmp_path / "data"}' for part in ('train', 'val', 'test')]
    done = run('train.py', CONFIG, '--gpus', 2, '--validate', 9, '--seed', 0, '--work_dir', tmp_path / 'work',
               '--cfg-options', *roots)
    assert done.returncode == 0, done.stderr
    scalars = next(tmp_path.glob('work/*/vis_data/scalars.json')).read_text().splitlines()
    evaluation = json.loads(scalars[-1])
    assert evaluation['coco/bbox_mAP'] > 0.45 and evaluation['coco/segm_mAP'] > 0.42
