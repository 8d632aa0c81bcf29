"""Train a detector.

    python tools/train.py configs/gcnet/mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py --validate

Several processes: ``--gpus N``, or tools/dist_train.sh.
"""

import argparse
import os
import os.path as osp
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process

from mmdet.checkpoint import find_checkpoint, load_meta
from mmdet.engine.amp import warn_of_slow_bfloat16
from mmdet.engine.launch import add_common_arguments, join_processes, parse_args, run_tool
from mmdet.engine.runner import DetectionRunner
from mmdet.evaluation.coco_metric import check_annotations
from mmdet.legacy_2019 import choose_numerics
from mmdet.utils.config import load_config
from mmdet.utils.env import setup_cpu


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Train a detector.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--validate', type=int, nargs='?', const=True, default=0, metavar='K',
                        help='evaluate on the validation set every K epochs, or iterations where the config '
                             'counts these (default: train_cfg.val_interval), and after the last')
    parser.add_argument('--resume_from', metavar='CHECKPOINT',
                        help="go on from this checkpoint; 'auto': from the last one in the work_dir")
    parser.add_argument('--seed', type=int, help='seed of all random numbers (default: random, and logged)')
    parser.add_argument('--compile', action='store_true',
                        help='torch.compile of backbone and neck; needs a C++ compiler on the CPU')
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    args = parse_args(make_parser(), argv)
    launcher = join_processes(args, argv)
    if launcher is None:
        return
    hardware = setup_cpu()
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    meta = set_start(cfg, args.resume_from, args.trust_checkpoint)
    seed_from = set_seed(cfg, args.seed, meta)
    cfg = choose_numerics(cfg, meta, args.legacy_2019)
    set_evaluation(cfg, args.validate)
    set_precision(cfg, args.amp)
    if args.compile:
        check_compiler()
        cfg.compile = True

    runner = DetectionRunner.from_cfg(cfg)
    runner.trust_checkpoint = args.trust_checkpoint
    runner.logger.info(f'work_dir: {runner.work_dir}, seed: {runner.seed}{seed_from}, '
                       f'processes: {runner.world_size}, {hardware}')
    if meta.get('legacy_2019'):
        runner.logger.info('trained with the numerics of the 2019 code, as the checkpoint was')
    if args.amp:
        warn_of_slow_bfloat16(runner.logger)
    if runner.val_loop is not None and is_main_process():
        check_annotations(runner.val_loop)
    runner.logger.info(f'log: {osp.join(runner.log_dir, runner.timestamp)}.log, numbers as JSON lines: '
                       f'{osp.join(runner.log_dir, "vis_data", "scalars.json")}')
    runner.train()


def check_compiler() -> None:
    """
    Raises:
        FileNotFoundError: torch.compile would find no compiler on the first batch.
    """
    compiler = os.environ.get('CXX', 'g++')
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise FileNotFoundError(f'--compile needs a C++ compiler, and there is no {compiler}: install one, '
                                'or name it with CXX=...')


def set_evaluation(cfg: Config, interval: int | bool) -> None:
    """Evaluate every ``interval`` epochs or iterations; True: as the config says; 0: never."""
    if interval < 0:
        raise ValueError(f'--validate {interval}: a number of epochs or iterations is needed')
    if not interval:
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    elif interval is not True:
        cfg.train_cfg.val_interval = interval


def set_precision(cfg: Config, amp: str | None) -> None:
    """Train in mixed precision if ``amp`` is 'auto', 'bf16' or 'fp16'."""
    if amp:
        dtype = {'auto': None, 'bf16': 'bfloat16', 'fp16': 'float16'}[amp]
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype)


def set_start(cfg: Config, resume_from: str | None, trust: bool) -> dict[str, Any]:
    """Resume where that is asked for; returns the ``meta`` of the checkpoint then, {} without one."""
    if resume_from == 'auto' or (resume_from is None and cfg.get('resume') and not cfg.get('load_from')):
        cfg.resume, resume_from = False, find_checkpoint(cfg.work_dir)  # None: nothing was saved yet
    if resume_from:
        cfg.resume, cfg.load_from = True, resume_from
    return load_meta(cfg.load_from, trust) if cfg.get('resume') else {}


def set_seed(cfg: Config, seed: int | None, meta: Mapping[str, Any]) -> str:
    """The seed that is given, or the checkpoint's, or the config's; returns where it comes from."""
    origin = ''
    if seed is None and meta.get('seed') is not None:
        seed, origin = meta['seed'], ' (of the checkpoint)'
    if seed is None:
        seed = cfg.get('randomness', {}).get('seed')
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f'the seed must be from 0 to {2**32 - 1}, not {seed}')
    cfg.randomness = dict(cfg.get('randomness', {}), seed=seed)
    return origin


if __name__ == '__main__':
    run_tool(main, 'interrupted; every checkpoint is whole, go on with --resume_from auto')
