"""Images a second by the size of the batch, in inference and training of Mask R-CNN R50-FPN.

    python benchmarks/scaling.py --data COCO --device cuda --amp
"""

import argparse
import statistics
import time
from typing import Any

import inference
import torch
import train_step
from common import Step, common_parser, write_json
from detectors import add_data_arguments, add_step_arguments
from terminaltables import AsciiTable


def measure(args: argparse.Namespace, step: Step) -> dict[str, Any]:
    """Seconds of a step, the median of the rounds after two that do not count, and a GPU's memory."""
    seconds = []
    cuda = args.device != 'cpu'
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.rounds + 2):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return dict(seconds=statistics.median(seconds[2:]), gigabytes=gigabytes)


def main() -> None:
    parser = common_parser(__doc__)
    add_data_arguments(parser)
    add_step_arguments(parser)
    parser.add_argument('--case', default='800', help='short side of the images')
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 2, 4, 8, 16, 32])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    records = []
    rows = [['batch', 'inference, images/s', 'GB on the GPU', 'training, images/s', 'GB on the GPU']]
    for batch in args.batches:
        args.batch = batch
        row = [str(batch)]
        for part, prepare in (('inference', inference.plain), ('training', train_step.plain)):
            found = measure(args, prepare(args))
            records.append(dict(batch=batch, part=part, **found))
            row += [f'{batch / found["seconds"]:.1f}', f'{found["gigabytes"]:.1f}']
        rows.append(row)
        print(AsciiTable(rows).table, flush=True)
    write_json(args, records)


if __name__ == '__main__':
    main()
