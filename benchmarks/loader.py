"""Images a second that the training loader gives, by its number of worker processes.

    python benchmarks/loader.py --data COCO

Reading, decoding, resizing to short side 800, masks, flipping: everything up to the model's door. Training
does not wait as long as this is more than the images a second that it takes (train_step.py).
"""

import statistics
import time
from typing import Any

from common import common_parser, positive, write_json
from detectors import CONFIGS, add_data_argument
from terminaltables import AsciiTable


def measure(cfg: Any, workers: int, rounds: int) -> list[float]:
    """Images a second of each pass over the data, but for the first, which starts the workers."""
    from mmdet.engine.runner import DetectionRunner

    loader = DetectionRunner.build_dataloader(
        dict(cfg, num_workers=workers, persistent_workers=workers > 0), seed=0)
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        images = sum(len(batch['inputs']) for batch in loader)
        rates.append(images / (time.perf_counter() - start))
    return rates[1:]


def main() -> None:
    parser = common_parser(__doc__)
    add_data_argument(parser)
    parser.add_argument('--batch', type=positive, help='images a batch')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2])
    args = parser.parse_args()
    from mmengine.registry import init_default_scope

    from mmdet.utils.config import load_config

    init_default_scope('mmdet')
    cfg = load_config(CONFIGS / 'mask_rcnn_r50_fpn_1x.py').train_dataloader
    cfg.dataset.data_root = str(args.data)
    cfg.batch_size = args.batch or cfg.batch_size
    records, rows = [], [['worker processes', 'images a second', 'a worker']]
    for workers in args.workers:
        rates = measure(cfg, workers, args.rounds)
        records.append(dict(workers=workers, images_per_second=rates))
        rate = statistics.median(rates)
        spread = f'{rate:.1f} ({min(rates):.1f} to {max(rates):.1f})'
        rows.append([str(workers), spread, f'{rate / max(workers, 1):.1f}'])
    print(AsciiTable(rows).table)
    write_json(args, records)


if __name__ == '__main__':
    main()
