"""The global context block against eager PyTorch (on CUDA also compiled), and plain reads and writes.

    python benchmarks/context_block.py --out context_block.json

All take turns in one process, malloc keeping memory for all; a line gives the medians, and ratios as median
(lower .. upper quartile) over the turns. The floor is the time in which plain PyTorch operations read and
write the bytes that cannot be avoided: of x, the identity, the output and the parameters, and the gradients.
"""
import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.context_block import ContextBlock
from mmdet.utils.env import keep_memory

SHAPES = [(2, 512, 100, 168), (2, 1024, 50, 84), (2, 2048, 25, 42)]  # c3, c4, c5 of two images at 800 x 1344
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def eager(block: ContextBlock, x: Tensor, identity: Tensor | None) -> Tensor:
    """The composition of PyTorch operations, as in mmdetection."""
    logits = block.conv_mask(x).flatten(2)
    context = (x.flatten(2) @ logits.softmax(dim=2).transpose(1, 2)).unsqueeze(3)
    x = x + block.channel_add_conv(context)
    return x if identity is None else F.relu(x + identity, inplace=True)


def ours(block: ContextBlock, x: Tensor, identity: Tensor | None) -> Tensor:
    return block(x, identity, relu=identity is not None)


def floor(
    x: Tensor, identity: Tensor | None, parameters: list[Tensor], backward: bool
) -> tuple[Callable[[], None], int]:
    """What reads and writes the unavoidable bytes, and their number."""
    a, b, out = x.detach(), torch.randn_like(x), torch.empty_like(x)
    flat = torch.cat([p.detach().flatten() for p in parameters])
    flat_out = torch.empty_like(flat)
    n, weights = x.nbytes, flat.nbytes
    fused = identity is not None
    size = (4 if fused else 3) * n + weights
    if backward:
        size += (6 if fused else 4) * n + 2 * weights

    def run() -> None:
        a.sum()  # pooling
        flat.sum()
        torch.add(a, b, out=out) if fused else out.copy_(a)
        if backward:
            # The gradient of the shift; of the identity, through the ReLU.
            torch.add(a, b, out=out) if fused else b.sum()
            torch.add(out, a, out=b)  # the gradient of x
            flat_out.copy_(flat)
    return run, size


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    """Exit unless two runs' results differ by rounding alone."""
    for ours_part, theirs_part in zip(found, expected):
        error = (ours_part - theirs_part).abs().max().item()
        bound = 200 * torch.finfo(theirs_part.dtype).eps * theirs_part.abs().max().item() + 1e-6
        if not error <= bound:
            raise SystemExit(f'results of shape {tuple(theirs_part.shape)} differ by {error} > {bound}')


def seconds(call: Callable[[], object], x: Tensor, clock: Callable[[], float]) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = clock()
    call()
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - begin


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4)


def measure(
    args: argparse.Namespace, shape: tuple[int, ...], ratio: float, fused: bool, backward: bool
) -> dict:
    """One line of the result."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    block = ContextBlock(shape[1], ratio).to(args.device, dtype)
    nn.init.normal_(block.channel_add_conv[3].weight, std=0.01)
    x, identity, grad = (
        part.to(args.device, dtype, memory_format=FORMATS[args.layout]) for part in torch.randn(3, *shape))
    inputs = [x.requires_grad_(), *([identity.requires_grad_()] if fused else []), *block.parameters()]
    # Not the mask's bias: softmax does not change with it, so that its gradient is rounding.
    bias = next(i for i, part in enumerate(inputs) if part is block.conv_mask.bias)

    def runner(function: Callable) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            if backward:
                output = function(block, x, identity if fused else None)
                grads = torch.autograd.grad(output, inputs, grad)
                return [output, *grads[:bias], *grads[bias + 1:]]
            with torch.no_grad():
                return [function(block, x, identity if fused else None)]
        return run

    calls = {'ours': runner(ours), 'eager': runner(eager)}
    if x.is_cuda:
        calls['compiled'] = runner(torch.compile(eager))
    expected = calls['eager']()
    for call in calls.values():
        agree(call(), expected)
    run_floor, size = floor(x, identity if fused else None, list(block.parameters()), backward)
    calls['floor'] = run_floor
    run_floor()
    clock = {'wall': time.perf_counter, 'cpu': time.process_time}[args.clock]
    turns = [{name: seconds(call, x, clock) for name, call in calls.items()} for _ in range(args.turns)]
    line = dict(shape=shape, ratio=ratio, layout=args.layout, fused=fused, backward=backward, bytes=size)
    line['ms'] = {name: round(statistics.median(turn[name] for turn in turns) * 1e3, 3) for name in calls}
    for name in calls:
        if name != 'ours':
            line[f'ours / {name}'] = [round(q, 3) for q in quartiles([t['ours'] / t[name] for t in turns])]
    return line


def describe(line: dict) -> str:
    name = f'{"x".join(map(str, line["shape"]))} r{round(1 / line["ratio"])} {line["layout"]}'
    name += ' residual' if line['fused'] else ' bare'
    name += ' forward+backward' if line['backward'] else ' forward'
    times = ', '.join(f'{key} {value:.2f}' for key, value in line['ms'].items())
    ratios = ', '.join(f'{key} {value[1]:.2f} ({value[0]:.2f} .. {value[2]:.2f})'
                       for key, value in line.items() if key.startswith('ours /'))
    return f'{name}: {line["bytes"] / 1e6:.1f} MB; ms: {times}; {ratios}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'float64', 'float16', 'bfloat16'])
    parser.add_argument('--layout', default='contiguous', choices=list(FORMATS))
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--turns', type=int, default=9)
    parser.add_argument('--clock', default='wall', choices=['wall', 'cpu'],
                        help='cpu: processor time, for a machine with other work on it and one thread')
    parser.add_argument('--out', type=Path, help='JSON file for the result')
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    lines = []
    for shape in SHAPES:
        for ratio in (1 / 4, 1 / 16):
            for fused in (False, True):
                for backward in (False, True):
                    lines.append(measure(args, shape, ratio, fused, backward))
                    print(describe(lines[-1]), flush=True)
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items()}
        result = dict(settings=settings, torch=torch.__version__, lines=lines)
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
