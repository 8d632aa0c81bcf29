"""The training loader, by its number of worker processes: a pass over the data, up to the model's door.

    python benchmarks/loader.py --data COCO

Reading, decoding, resizing to short side 800, masks, flipping. Training does not wait as long as this gives
more images a second than it takes (train_step.py).
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import Step, common_parser, main, positive
from detectors import CONFIGS, PLAIN, add_data_argument, interpreter


def ours(args: argparse.Namespace) -> Step:
    from mmengine.registry import init_default_scope

    from mmdet.engine.runner import DetectionRunner
    from mmdet.utils.config import load_config

    init_default_scope('mmdet')
    cfg = load_config(CONFIGS / PLAIN).train_dataloader
    return passing(cfg, DetectionRunner.build_dataloader, str(args.data), args.batch, int(args.case))


def passing(cfg: Any, build: Any, data: str, batch: int, workers: int) -> Step:
    """A step is a pass over all images, by workers that live on."""
    cfg.dataset.data_root = data
    cfg.update(batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
    loader = build(cfg, seed=0)

    def step() -> Any:
        return dict(images=sum(len(items['inputs']) for items in loader))
    return step


def agree(args: argparse.Namespace, results: dict[str, Any]) -> Iterable[str]:
    counts = {result['images'] for result in results.values()}
    if len(counts) > 1:
        raise SystemExit(f'error: passes have other numbers of images: {results}')
    yield f'{counts.pop()} images a pass, worker processes: {args.case}'


def mmdetection(args: argparse.Namespace, case: str) -> dict[str, list[str]]:
    if not args.mmdetection:
        return {}
    file = Path(__file__).with_name('peer_mmdetection.py')
    words = ['loader', str(args.data), str(args.batch), case, str(args.threads)]
    return dict(mmdetection=[args.mmdetection, str(file), *words])


if __name__ == '__main__':
    parser = common_parser(__doc__)
    add_data_argument(parser)
    parser.add_argument('--batch', type=positive, default=2, help='images a batch')
    parser.add_argument('--mmdetection', type=interpreter, metavar='PYTHON',
                        help='Python of an environment with mmdetection')
    parser.set_defaults(device='cpu')
    main(parser, dict(ours=ours), ['0', '1', '2'], agree, mmdetection)
