"""Does global context help? Train the quick start's model with each kind of context block, and compare.

    python tools/make_synthetic.py data/synthetic
    python tools/analysis/context_experiment.py --data data/synthetic --out work_dirs/context_experiment

Trains with tools/train.py and tests with tools/test.py, run by run. What is finished is not repeated: after
an interruption the same command goes on. After every run it writes results.json, results.md and results.png
to --out.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from matplotlib.figure import Figure

from mmdet.datasets.synthetic import CLASSES, CONTEXT_CLASSES
from mmdet.engine.launch import parse_args, run_tool
from mmdet.evaluation.coco_eval import run_coco_eval, select_ground_truth
from mmdet.utils.coco_file import read_annotation_file
from mmdet.utils.files import write_file

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/quickstart/mask_rcnn_r4_gcb_c3-c5_r18_fpn_synthetic.py'

# The blocks stand in c3-c5, after the last norm of each residual block.
VARIANTS: dict[str, dict[str, Any]] = {
    'none': {'model.backbone.stage_with_gcb': (False, False, False, False)},
    'SE': {'model.backbone.gcb.type': 'SE', 'model.backbone.gcb.ratio': 1 / 16},
    'NL': {'model.backbone.gcb.type': 'NL', 'model.backbone.gcb.ratio': 1 / 2},
    'GC-r16': {'model.backbone.gcb.ratio': 1 / 16},
    'GC-r4': {'model.backbone.gcb.ratio': 1 / 4},
}
GROUPS = {
    'ambiguous': tuple(CONTEXT_CLASSES),
    'others': tuple(name for name in CLASSES if name not in CONTEXT_CLASSES),
}
NAMED_RIGHT = 'named right'
COLUMNS = (*(f'{kind} AP, {group}' for kind in ('box', 'mask') for group in GROUPS), NAMED_RIGHT)
Numbers = dict[str, float]
"""For each of ``COLUMNS``, a number from 0 to 1."""
Runs = dict[str, dict[int, Numbers]]
"""Variant -> seed -> what the run gave."""


def measure(ann_file: Path, predictions: Path) -> Numbers:
    """What ``predictions``.bbox.json and .segm.json (COCO results) are worth on ``ann_file``.

    AP is the mean over the classes of a group, at IoU 0.50:0.95.

    Raises:
        ValueError: a group has no object in ``ann_file``.
    """
    content = read_annotation_file(ann_file)
    names = {category['id']: category['name'] for category in content['categories']}
    truth = select_ground_truth(content, [image['id'] for image in content['images']], list(names))
    numbers = {}
    for kind, iou_type in (('box', 'bbox'), ('mask', 'segm')):
        records = json.loads(Path(f'{predictions}.{iou_type}.json').read_text())
        class_ap = run_coco_eval(truth, records, iou_type).class_ap[:, 0]
        for group, classes in GROUPS.items():
            defined = [ap for i, ap in zip(sorted(names), class_ap) if names[i] in classes and ap > -1]
            if not defined:
                raise ValueError(f'{ann_file} has no object of {", ".join(classes)}: draw more images')
            numbers[f'{kind} AP, {group}'] = float(np.mean(defined))
        if kind == 'box':
            ambiguous = {i for i in names if names[i] in CONTEXT_CLASSES}
            numbers[NAMED_RIGHT] = share_named_right(truth['annotations'], records, ambiguous)
    return numbers


def share_named_right(truths: list[dict[str, Any]], records: list[dict[str, Any]], wanted: set[int]) -> float:
    """Of the objects of ``wanted`` categories that are found, the share named right; 0 if none is found.

    An object is found if detections of any wanted category overlap its box by an IoU of 0.5; the one
    with the highest score names it. Guessing among three gives 1/3.
    """
    found: list[bool] = []
    for truth in truths:
        if truth['category_id'] in wanted and not truth['iscrowd']:
            near = [record for record in records
                    if record['image_id'] == truth['image_id'] and record['category_id'] in wanted
                    and pycocotools.mask.iou([record['bbox']], [truth['bbox']], [0])[0, 0] >= 0.5]
            if near:
                best = max(near, key=lambda record: record['score'])
                found.append(best['category_id'] == truth['category_id'])
    return float(np.mean(found or [0]))


def run(variant: str, seed: int, args: argparse.Namespace) -> Numbers:
    """Train and test, as far as that is not done; the numbers are kept in result.json."""
    folder = args.out / variant / f'seed_{seed}'
    result, checkpoint = folder / 'result.json', folder / f'epoch_{args.epochs}.pth'
    if result.exists():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    options = [f'{key}={value}'.replace(' ', '') for key, value in VARIANTS[variant].items()]
    options += [f'{part}_dataloader.dataset.data_root={args.data.resolve()}' for part in ('train', 'test')]
    options += [f'train_cfg.max_epochs={args.epochs}', f'param_scheduler.1.end={args.epochs}',
                f'param_scheduler.1.T_max={args.epochs}', *args.cfg_options]
    common = ['--work_dir', folder, '--cfg_options', *options]
    if not checkpoint.exists():
        call('train.py', CONFIG, '--seed', seed, '--resume_from', 'auto', *common, log=folder / 'log.txt')
    call('test.py', CONFIG, checkpoint, '--json_prefix', folder / 'val', *common, log=folder / 'log.txt')
    numbers = measure(args.data / 'annotations/instances_val.json', folder / 'val')
    write_file(result, json.dumps(numbers).encode())
    return numbers


def call(tool: str, *arguments: object, log: Path) -> None:
    """Run a tool of this project, with its output in ``log``.

    Raises:
        ChildProcessError: it failed.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    with log.open('a') as output:
        done = subprocess.run([sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)],
                              env=os.environ | dict(PYTHONPATH=path), stdout=output, stderr=output)
    if done.returncode:
        raise ChildProcessError(f'{tool} failed with status {done.returncode}; the end of {log} says why')


def markdown(runs: Runs) -> str:
    """A row a variant: mean and standard deviation over its seeds, in percent."""
    lines = [['block', 'runs', *COLUMNS], ['---', *['---:'] * (len(COLUMNS) + 1)]]
    for variant, seeds in runs.items():
        cells = []
        for column in COLUMNS:
            values = [100 * numbers[column] for numbers in seeds.values()]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.1f}{spread}')
        lines.append([variant, str(len(seeds)), *cells])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def draw(runs: Runs, out: Path) -> None:
    """A panel a column: a dot a run, a bar at the mean of each variant."""
    figure = Figure(figsize=(2.7 * len(COLUMNS), 3.2), layout='constrained')
    for i, column in enumerate(COLUMNS, 1):
        ax = figure.add_subplot(1, len(COLUMNS), i)
        for x, seeds in enumerate(runs.values()):
            values = [100 * numbers[column] for numbers in seeds.values()]
            ax.bar(x, statistics.mean(values), color=f'C{x}', alpha=0.35)
            ax.plot([x] * len(values), values, 'o', color=f'C{x}', markersize=4)
        if column == NAMED_RIGHT:
            ax.axhline(100 / len(CONTEXT_CLASSES), color='grey', linestyle='--', linewidth=1)
        ax.set_xticks(range(len(runs)), list(runs), rotation=45)
        ax.set_title(f'{column} (%)', fontsize='medium')
        ax.spines[['top', 'right']].set_visible(False)
    figure.savefig(out, dpi=80)


def keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Note in ``out`` what all its runs have in common.

    Raises:
        ValueError: ``out`` has runs of other settings.
    """
    path = out / 'settings.json'
    if path.exists():
        kept = json.loads(path.read_text())
        for name, value in settings.items():
            if kept[name] != value:
                raise ValueError(
                    f'--out {out} holds runs with {name}={kept[name]}, not {value}: choose another')
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(settings).encode())


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder that tools/make_synthetic.py wrote')
    parser.add_argument('--out', type=Path, required=True, help='folder of the runs and their results')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS),
                        help='default: all of them')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--epochs', type=int, default=3, help='default: 3')
    parser.add_argument('--cfg_options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='further settings of all runs')
    args = parse_args(parser, argv)
    ann_files = [args.data / f'annotations/instances_{part}.json' for part in ('train', 'val')]
    if missing := [path for path in ann_files if not path.is_file()]:
        raise FileNotFoundError(f'{missing[0]} does not exist: python tools/make_synthetic.py {args.data}')
    if args.epochs < 1 or min(args.seeds) < 0:
        raise ValueError(f'--epochs {args.epochs} --seeds {min(args.seeds)}: epochs from 1, seeds from 0')
    keep_settings(args.out, dict(
        data=str(args.data.resolve()), epochs=args.epochs, cfg_options=args.cfg_options))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the tool that runs ends as well

    runs: Runs = {variant: {} for variant in dict.fromkeys(args.variants)}
    # Seed by seed, so that an experiment cut short still compares all variants.
    todo = [(variant, seed) for seed in dict.fromkeys(args.seeds) for variant in runs]
    for i, (variant, seed) in enumerate(todo, 1):
        start = time.monotonic()
        runs[variant][seed] = numbers = run(variant, seed, args)
        print(f'[{i}/{len(todo)}] {variant}, seed {seed}, {(time.monotonic() - start) / 60:.1f} min: '
              + ', '.join(f'{column} {100 * numbers[column]:.1f}' for column in COLUMNS), flush=True)
        finished = {variant: seeds for variant, seeds in runs.items() if seeds}
        write_file(args.out / 'results.json', json.dumps(finished, indent=1).encode())
        write_file(args.out / 'results.md', markdown(finished).encode())
        draw(finished, args.out / 'results.png')
    print(f'\n{markdown(runs)}\nWrote {args.out}/results.json, results.md and results.png')


if __name__ == '__main__':
    run_tool(main, 'interrupted; the same command goes on')
