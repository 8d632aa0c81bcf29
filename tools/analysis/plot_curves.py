"""Draw the loss and AP curves of trainings from their JSON-lines logs.

    python tools/analysis/plot_curves.py work_dirs/NAME --out curves.png
    python tools/analysis/plot_curves.py a.json b.json --out curves.png --keys loss_mask coco/segm_mAP_50
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmdet.engine.launch import parse_args, run_tool

DEFAULT_KEYS = ('loss', 'coco/bbox_mAP', 'coco/segm_mAP')
Curve = tuple[list[float], list[float]]


def find_log(path: str) -> Path:
    """``path`` if it is a log file; the newest log of a training if it is a work folder."""
    if not Path(path).is_dir():
        return Path(path)
    logs = sorted(Path(path).glob('**/vis_data/scalars.json'), key=lambda log: log.stat().st_mtime)
    trainings = [log for log in logs if 'loss' in read_curves(log)]
    if not trainings:
        raise ValueError(f'{path} holds no log of a training (vis_data/scalars.json with a loss)')
    return trainings[-1]


def read_records(log: Path) -> list[dict[str, Any]]:
    """The lines of the log, each with its 'step': iterations in training, see ``evaluation_unit``."""
    try:
        records = [json.loads(line) for line in log.read_text().splitlines() if line]
    except FileNotFoundError:
        raise FileNotFoundError(f'log {log} does not exist') from None
    except ValueError as error:
        raise ValueError(f'log {log} does not hold JSON lines: {error}') from None
    if not all(isinstance(record, dict) and 'step' in record for record in records):
        raise ValueError(f'log {log} has a line without "step": give a scalars.json of a training')
    return records


def read_curves(log: Path) -> dict[str, Curve]:
    """For each number in the log, its steps and values."""
    curves: dict[str, Curve] = {}
    for record in read_records(log):
        for key, value in record.items():
            if isinstance(value, (int, float)) and key not in ('step', 'iter', 'epoch'):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(record['step'])
                values.append(value)
    return curves


def evaluation_unit(log: Path) -> str:
    """'epoch' or 'iteration': what the steps of the log's evaluations count."""
    training = [record for record in read_records(log) if 'loss' in record]
    return 'iteration' if training and not any('epoch' in record for record in training) else 'epoch'


def choose_keys(curves: dict[str, Curve], keys: Sequence[str] | None, log: Path) -> list[str]:
    """The keys asked for, or the default ones that the log has."""
    if unknown := [key for key in keys or () if key not in curves]:
        raise ValueError(f'log {log} has no {unknown[0]}; it has {", ".join(sorted(curves)) or "nothing"}')
    chosen = list(keys or (key for key in DEFAULT_KEYS if key in curves))
    if not chosen:
        raise ValueError(f'log {log} has none of {", ".join(DEFAULT_KEYS)}: choose --keys')
    return chosen


def draw(logs: Sequence[Path], keys: Sequence[str] | None, out: Path) -> None:
    """Training curves over iterations on the left, evaluation curves over epochs or iterations beside."""
    drawn = [(log, key, *curves[key])
             for log in logs for curves in [read_curves(log)] for key in choose_keys(curves, keys, log)]
    # mmengine names the numbers of an evaluation PREFIX/NAME, those of training plainly.
    units = {log: evaluation_unit(log) for log in logs}
    panels = [('iteration', [curve for curve in drawn if '/' not in curve[1]])]
    panels += [(unit, [curve for curve in drawn if '/' in curve[1] and units[curve[0]] == unit])
               for unit in ('epoch', 'iteration')]
    panels = [(axis, curves) for axis, curves in panels if curves]
    figure = Figure(figsize=(6 * len(panels), 4), layout='constrained')
    for i, (axis, curves) in enumerate(panels, 1):
        ax = figure.add_subplot(1, len(panels), i)
        for log, key, steps, values in curves:
            label = key if len(logs) == 1 else f'{key} ({run_name(log)})'
            marker = 'o' if len(steps) < 40 else None
            ax.plot(steps, values, label=label, linewidth=1.6, marker=marker, markersize=3)
        ax.set_xlabel(axis)
        ax.set_ylim(bottom=min(0, *(value for *_, values in curves for value in values)))
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
        ax.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def run_name(log: Path) -> str:
    """NAME of work_dirs/NAME/TIME/vis_data/scalars.json; else the file's own name."""
    in_work_dir = log.parent.name == 'vis_data' and len(log.resolve().parents) > 2
    return log.resolve().parents[2].name if in_work_dir else log.stem


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description='Draw the loss and AP curves of trainings.')
    parser.add_argument('logs', nargs='+', metavar='LOG',
                        help='scalars.json of a training, or its work folder')
    parser.add_argument('--out', type=Path, required=True, help='picture to write (.png, .svg, .pdf)')
    parser.add_argument('--keys', nargs='+', help=f'default: {" ".join(DEFAULT_KEYS)}')
    args = parse_args(parser, argv)
    formats = FigureCanvasAgg.get_supported_filetypes()
    if args.out.suffix[1:] not in formats:
        raise ValueError(f'--out {args.out} is not a picture: take one of {", ".join(sorted(formats))}')
    draw([find_log(path) for path in args.logs], args.keys, args.out)
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    run_tool(main)
