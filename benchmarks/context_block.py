"""The global context block against eager PyTorch (on CUDA also compiled), and plain reads and writes.

The first line of a case is the floor: PyTorch operations that read and write the bytes that cannot be
avoided, of x, the output, the identity, the parameters and the gradients. On CUDA the block's bandwidth on
these bytes is compared with that of copying a map as well, and all is timed once more as CUDA graphs, which
shows what the GPU takes, whatever the host needs to launch it.
"""
import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from alternate import compare, op_parser
from common import positive, write_json
from torch import Tensor, nn

from mmdet.models.layers.context_block import ContextBlock

SIZES = {512: (100, 168), 1024: (50, 84), 2048: (25, 42)}  # by channels: c3, c4, c5 at 800 x 1344
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def ratio_of_channels(text: str) -> float:
    """A flag's value: a ratio that leaves a channel."""
    if not 1 / min(SIZES) <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no ratio from 1/{min(SIZES)} to 1')
    return float(text)


def eager(block: ContextBlock, x: Tensor, identity: Tensor | None) -> Tensor:
    """The usual composition of PyTorch operations."""
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
    weights = torch.cat([p.detach().flatten() for p in parameters])
    weights_out = torch.empty_like(weights)
    residual = identity is not None
    size = (4 if residual else 3) * x.nbytes + weights.nbytes
    if backward:
        size += (6 if residual else 4) * x.nbytes + 2 * weights.nbytes

    def run() -> None:
        a.sum()  # pooling
        weights.sum()
        if residual:
            torch.add(a, b, out=out)
        else:
            out.copy_(a)
        if backward:
            if residual:
                torch.add(a, b, out=out)  # the gradient through the ReLU, which is the identity's
            else:
                b.sum()  # the gradient of the shift
            torch.add(out, a, out=b)  # the gradient of x
            weights_out.copy_(weights)
    return run, size


def measure(
    args: argparse.Namespace, layout: str, shape: tuple[int, ...], ratio: float, residual: bool,
    backward: bool,
) -> list[dict]:
    """The records of one case."""
    dtype = getattr(torch, args.dtype)
    block = ContextBlock(shape[1], ratio).to(args.device, dtype)
    nn.init.normal_(block.channel_add_conv[3].weight, std=0.01)
    x, identity, grad = (
        part.to(args.device, dtype, memory_format=FORMATS[layout]) for part in torch.randn(3, *shape))
    with torch.no_grad():  # away from the ReLU's kink, where rounding decides on a gradient
        identity += 0.1 * ((block(x) + identity).abs() < 0.01)
    given = identity.requires_grad_() if residual else None
    inputs = [x.requires_grad_(), *([identity] if residual else []), *block.parameters()]

    def runner(function: Callable) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            if backward:
                output = function(block, x, given)
                return [output.detach(), *torch.autograd.grad(output, inputs, grad)]
            with torch.no_grad():
                return [function(block, x, given)]
        return run

    functions = {'mmdet': runner(ours), 'eager': runner(eager)}
    if x.is_cuda:
        torch.compiler.reset()  # else the limit of recompilations is reached
        functions['compiled'] = runner(torch.compile(eager, dynamic=False))
    results = [function() for function in functions.values()]
    for found in results:
        for part, expected in zip(found, results[0]):
            # Not the mask's bias: softmax does not change with it, its gradient is rounding.
            if part.numel() > 1:
                bound = 200 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    part, expected, rtol=bound, atol=bound * expected.abs().max().item())
    run_floor, size = floor(x, given, list(block.parameters()), backward)
    if x.is_cuda:
        target = torch.empty_like(grad)
        functions['copy'] = lambda: [target.copy_(grad)]
    case = f'{layout} {"x".join(map(str, shape))} r{round(1 / ratio)}{" residual" if residual else ""}'
    case += ' f+b' if backward else ' f'
    functions = {f'{size / 1e6:.1f} MB': run_floor, **functions}
    runs = {case: functions}
    if x.is_cuda:
        runs[f'{case} graph'] = {name: captured(function) for name, function in functions.items()}
    records = []
    for title, timed in runs.items():
        records += compare(title, timed, args.rounds)
        summarize(records[-len(timed):], size, 2 * grad.nbytes)
    return [dict(record, bytes=size) for record in records]


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """What runs the function's kernels, as a CUDA graph.

    Of what earlier calls gave nothing may need a gradient: its nodes would belong to another stream.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def summarize(records: list[dict], size: int, copied: int) -> None:
    """Print how many times as fast as the others ours is, and on a GPU its bandwidth."""
    case, times = records[0]['case'], {record['name']: record for record in records}
    for clock in ('wall', 'cpu'):
        fast = times['eager'][clock]['milliseconds'] / times['mmdet'][clock]['milliseconds']
        print(f'{case:48} mmdet is {fast:.2f} times as fast as eager ({clock})', flush=True)
    if 'copy' in times:
        own, compiled, copy = (times[name]['wall']['milliseconds'] for name in ('mmdet', 'compiled', 'copy'))
        share = size / own / (copied / copy)
        print(f'{case:48} mmdet is {compiled / own:.2f} times as fast as compiled, '
              f'{size / own / 1e6:.0f} GB/s, {share:.0%} of copying {copied / 2e6:.0f} MB', flush=True)


def main() -> None:
    parser = op_parser(__doc__)
    parser.add_argument('--dtype', default='float32', choices=['float32', 'float64', 'float16', 'bfloat16'])
    parser.add_argument('--layouts', nargs='+', default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument('--channels', nargs='+', type=int, default=list(SIZES), choices=list(SIZES))
    parser.add_argument('--ratios', nargs='+', type=ratio_of_channels, default=[1 / 4, 1 / 16])
    parser.add_argument('--images', nargs='+', type=positive, default=[2])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # it would round eager's logits to 10 bits
    records = []
    for layout, images, channels, ratio, residual, backward in itertools.product(
            args.layouts, args.images, args.channels, args.ratios, (False, True), (False, True)):
        shape = (images, channels, *SIZES[channels])
        records += measure(args, layout, shape, ratio, residual, backward)
    print('outputs and gradients agree within 200 roundings of the largest')
    write_json(args, records)


if __name__ == '__main__':
    main()
