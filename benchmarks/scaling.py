"""Images a second by the size of the batch, in inference and training of Mask R-CNN R50-FPN.

    python benchmarks/scaling.py --data COCO --device cuda --amp
"""

import os
import statistics
from typing import Any

import inference
import torch
import train_step
from common import Step, common_parser, positive, time_step, write_json
from detectors import add_step_arguments
from terminaltables import AsciiTable


def measure(step: Step, rounds: int) -> dict[str, Any]:
    """Seconds of each step after two that do not count, and a GPU's memory."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    measured = [time_step(step) for _ in range(rounds + 2)]
    return dict(
        seconds=[each['wall'] for each in measured[2:]], gigabytes=measured[-1].get('GB on the GPU', 0.0))


def main() -> None:
    parser = common_parser(__doc__)
    add_step_arguments(parser)
    parser.add_argument('--case', type=positive, default=800, help='short side of the images')
    parser.add_argument('--batches', nargs='+', type=positive, default=[1, 2, 4, 8, 16, 32])
    args = parser.parse_args()
    os.environ['OMP_NUM_THREADS'] = str(args.threads)  # where the detectors' setup_cpu finds it
    records = []
    rows = [['batch', 'inference, images/s', 'GB on the GPU', 'training, images/s', 'GB on the GPU']]
    for batch in args.batches:
        args.batch = batch
        row = [str(batch)]
        for part, prepare in (('inference', inference.plain), ('training', train_step.plain)):
            found = measure(prepare(args), args.rounds)
            records.append(dict(batch=batch, part=part, **found))
            rates = [batch / seconds for seconds in found['seconds']]
            row += [f'{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})',
                    f'{found["gigabytes"]:.1f}']
        rows.append(row)
        print(AsciiTable(rows).table, flush=True)
    write_json(args, records)


if __name__ == '__main__':
    main()
