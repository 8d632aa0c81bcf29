"""Test a detector: write its predictions, draw them, evaluate them.

    python tools/test.py configs/gcnet/mask_rcnn_r50_fpn_1x.py epoch_12.pth --eval bbox segm
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process

from mmdet.checkpoint import check_classes, load_meta
from mmdet.checkpoint_files import require_file
from mmdet.engine.amp import warn_of_slow_bfloat16
from mmdet.engine.launch import add_common_arguments, join_processes, parse_args, run_tool
from mmdet.engine.runner import DetectionRunner
from mmdet.evaluation.coco_metric import check_annotations
from mmdet.legacy_2019 import choose_numerics
from mmdet.models.layers.norm import fold_batch_norms
from mmdet.utils.config import load_config
from mmdet.utils.env import setup_cpu


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Test a detector.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint: file or URL, .pth or .safetensors')
    parser.add_argument('--eval', nargs='+', choices=['bbox', 'segm'], default=[], help='print COCO AP')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions, a dict an image')
    parser.add_argument('--json_prefix', metavar='PREFIX', help='write PREFIX.bbox.json and PREFIX.segm.json')
    parser.add_argument('--show_dir', metavar='FOLDER', help='draw the predictions on the images')
    parser.add_argument('--eval_backend', choices=['hotcoco', 'pycocotools'], help='what computes AP')
    parser.add_argument('--allow_partial', action='store_true',
                        help='test although the checkpoint lacks weights, or has others than the model')
    parser.add_argument('--fuse_conv_bn', action='store_true',
                        help='fold batch norms into the convolutions before them, which rounds differently')
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    args = parse_args(make_parser(), argv)
    if not (args.eval or args.out or args.json_prefix or args.show_dir):
        raise ValueError(
            'nothing to do with the predictions: give --eval, --out, --json_prefix or --show_dir')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out {args.out} must end in .pkl or .pickle')
    if '://' not in args.checkpoint:
        require_file(Path(args.checkpoint))
    for folder in (args.show_dir, *(Path(path).parent for path in (args.out, args.json_prefix) if path)):
        if folder:
            check_writable(Path(folder))
    launcher = join_processes(args, argv)
    if launcher is None:
        return
    hardware = setup_cpu()
    cfg = load_config(args.config, args.cfg_options)
    meta = load_meta(args.checkpoint, args.trust_checkpoint)
    cfg = choose_numerics(cfg, meta, args.legacy_2019)
    cfg.launcher = launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    set_test(cfg, args)
    set_precision(cfg, args.amp)

    runner = DetectionRunner.from_cfg(cfg)
    runner.logger.info(f'work_dir: {runner.work_dir}, processes: {runner.world_size}, {hardware}')
    if args.amp:
        warn_of_slow_bfloat16(runner.logger)
    if cfg.get('legacy_2019'):
        origin = 'which the checkpoint was trained with' if meta.get('legacy_2019') else 'as asked for'
        runner.logger.info(f'tested with the numerics of the 2019 code, {origin}')
    runner.trust_checkpoint = args.trust_checkpoint
    checkpoint = runner.load_checkpoint(args.checkpoint, strict=not args.allow_partial)
    classes = runner.test_dataloader.dataset.metainfo['classes']
    check_classes(checkpoint.get('meta', {}), classes, args.checkpoint)
    if args.eval and is_main_process():
        check_annotations(runner.test_loop)
    if args.fuse_conv_bn:
        number = fold_batch_norms(runner.bare_model.eval())
        runner.logger.info(f'{number} batch norms folded into convolutions')
    runner.test()


def check_writable(folder: Path) -> None:
    """Find out before the test, not after it.

    Raises:
        OSError: no file can be written to ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def set_test(cfg: Config, args: argparse.Namespace) -> None:
    """Leave of the config what testing needs, and set the evaluator to what was asked for."""
    for key in ('train', 'val'):
        for part in ('dataloader', 'cfg'):
            cfg[f'{key}_{part}'] = None
    cfg.val_evaluator = cfg.optim_wrapper = cfg.param_scheduler = cfg.load_from = None
    cfg.resume = False
    # The first of several is the one that the flags are for.
    evaluator = cfg.test_evaluator
    if isinstance(evaluator, dict):
        evaluator = evaluator.get('metrics', evaluator)  # of an Evaluator
    evaluator = evaluator[0] if isinstance(evaluator, list) else evaluator
    given = dict(out=args.out, outfile_prefix=args.json_prefix, eval_backend=args.eval_backend)
    evaluator.update({key: value for key, value in given.items() if value}, metric=args.eval)
    # A checkpoint's weights are the averages already; there is nothing to stop.
    training = ('EMAHook', 'EarlyStoppingHook')
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook['type'] not in training]
    if args.show_dir:
        cfg.custom_hooks.append(dict(type='DrawHook', out_dir=args.show_dir))


def set_precision(cfg: Config, amp: str | None) -> None:
    """Test in mixed precision if ``amp`` is 'auto', 'bf16' or 'fp16'.

    Raises:
        ValueError: float16 without a GPU.
    """
    if amp is None:
        return
    cfg.test_cfg.fp16 = True  # any half precision: the default of autocast, which is bfloat16 on the CPU
    if torch.cuda.is_available():
        torch.set_autocast_dtype('cuda', torch.bfloat16 if amp == 'bf16' else torch.float16)
    elif amp == 'fp16':
        raise ValueError('float16 needs a GPU; on the CPU use bfloat16 (--amp bf16)')


if __name__ == '__main__':
    run_tool(main)
