"""Run by torch.distributed.run: four epochs at once and two and two, and three iterations, into a folder."""

import sys
from pathlib import Path

import torch.distributed

from mmdet.engine.runner import DetectionRunner
from mmdet.utils.config import load_config

folder = Path(sys.argv[1])


def train(name: str, **options: object) -> None:
    cfg = load_config(Path(__file__).parent / 'toy_config.py', options)
    cfg.update(launcher='pytorch', work_dir=str(folder / name), randomness=dict(seed=3), experiment_name=name)
    runner = DetectionRunner.from_cfg(cfg)
    runner.train()
    assert runner.model.find_unused_parameters == (name == 'iters')


precise = dict(custom_hooks=[dict(type='PreciseBNHook', num_iters=9, interval=2)])
train('four', val_cfg=None, val_dataloader=None, val_evaluator=None, **precise)
train('two', **precise, **{'train_cfg.max_epochs': 2})
train('rest', **precise, load_from=str(folder / 'two' / 'epoch_2.pth'), resume=True)
accumulated = {'optim_wrapper.accumulative_counts': 2, 'train_cfg.val_interval': 9}
train('accumulated', **accumulated)
train('more', load_from=str(folder / 'accumulated' / 'epoch_1.pth'), resume=True, **accumulated)
train('iters', find_unused_parameters=True, **{
    'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3, val_interval=3),
    'val_evaluator.out': str(folder / 'iters.txt'),
    'default_hooks.checkpoint': dict(by_epoch=False, interval=3)})
torch.distributed.destroy_process_group()
