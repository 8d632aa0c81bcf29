"""Time functions in turns in one process, so that what else the machine does falls on all of them alike.

Malloc keeps memory for all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import common_parser, device

from mmdet.utils.env import keep_memory

CALLS = 20  # in a GPU's queue


def op_parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags of a benchmark of an op."""
    parser = common_parser(doc)
    parser.add_argument('--device', type=device, default='cpu')
    return parser


def time_in_turns(
    functions: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds on the clock and of CPU time in each round, after one that does not count.

    A round is one call; on a GPU a queue of them, as in a network, where launching does not add to the time
    while the GPU has enough to do.
    """
    keep_memory()
    calls = CALLS if torch.cuda.is_initialized() else 1
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            times[name].append((1000 * spent[0] / calls, 1000 * spent[1] / calls))
    return {name: series[1:] for name, series in times.items()}


def compare(case: str, functions: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    """Print and return the median times, and how many times as fast as the first function each is.

    The ratio is the median over the rounds, its spread the smallest and the largest. Where others load the
    machine, that of the CPU time says more.
    """
    times = time_in_turns(functions, rounds)
    first = next(iter(times.values()))
    records = []
    for name, series in times.items():
        record: dict[str, Any] = dict(case=case, name=name)
        for i, clock in enumerate(('wall', 'cpu')):
            ratios = sorted(base[i] / own[i] for base, own in zip(first, series))
            record[clock] = dict(milliseconds=statistics.median(own[i] for own in series),
                                 ratio=statistics.median(ratios), smallest=ratios[0], largest=ratios[-1])
        wall, cpu = record['wall'], record['cpu']
        print(f'{case:48} {name:26} {wall["milliseconds"]:9.3f} ms, {wall["ratio"]:6.2f} times as fast '
              f'({wall["smallest"]:.2f} to {wall["largest"]:.2f}), by CPU time {cpu["ratio"]:.2f}')
        records.append(record)
    return records
