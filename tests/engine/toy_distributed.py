"""Run by torch.distributed.run: four epochs at once and two and two, into the folder given."""

import sys
from pathlib import Path

import torch.distributed

from mmdet.engine.runner import DetectionRunner
from mmdet.utils.config import load_config

folder = Path(sys.argv[1])


def train(name: str, **options: object) -> None:
    cfg = load_config(Path(__file__).parent / 'toy_config.py', options)
    cfg.update(launcher='pytorch', work_dir=str(folder / name), randomness=dict(seed=3), experiment_name=name)
    DetectionRunner.from_cfg(cfg).train()


train('four', val_cfg=None, val_dataloader=None, val_evaluator=None)
train('two', **{'train_cfg.max_epochs': 2})
train('rest', load_from=str(folder / 'two' / 'epoch_2.pth'), resume=True)
torch.distributed.destroy_process_group()
