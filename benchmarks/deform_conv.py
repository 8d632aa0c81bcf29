"""Deformable 3x3 convolution against torchvision's: c3 to c5 of X101-32x4d and R50, two images of 800 x 1344.

The plain convolution of the same groups is shown beside them.
"""

from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from alternate import compare, op_parser
from common import write_json
from torch import Tensor

from mmdet.ops import deform_conv2d

SIZES = ((100, 168), (50, 84), (25, 42))  # c3, c4, c5
CHANNELS = {32: (256, 512, 1024), 1: (128, 256, 512)}  # by groups


def torchvision_conv(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return torchvision.ops.deform_conv2d(x, offset, weight, padding=1)


def own_conv(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(x, offset, None, weight, padding=1)


def measure(groups: int, channels: int, size: tuple[int, int], rounds: int) -> list[dict]:
    x, offset = torch.randn(2, channels, *size), torch.randn(2, 18, *size)
    weight = torch.randn(channels, channels // groups, 3, 3) / (9 * channels / groups) ** 0.5
    inputs = [part.requires_grad_() for part in (x, offset, weight)]
    grad = torch.randn(2, channels, *size)
    forward, both, results = {}, {}, []
    for name, op in (('torchvision', torchvision_conv), ('mmdet', own_conv)):
        def step(op=op) -> list[Tensor]:
            output = op(*inputs)
            return [output, *torch.autograd.grad(output, inputs, grad)]
        forward[name], both[name] = partial(torch.no_grad()(op), *inputs), step
        results.append(step())
    forward['plain'] = partial(torch.no_grad()(F.conv2d), x, inputs[2], padding=1, groups=groups)
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    case = f'{"x".join(map(str, x.shape))}, {groups} groups'
    return compare(f'{case}, forward', forward, rounds) + compare(f'{case}, with backward', both, rounds)


def main() -> None:
    args = op_parser(__doc__).parse_args()
    if args.device != 'cpu':
        raise SystemExit("error: on a GPU torchvision's operator is used, so there is nothing to compare")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    for groups, widths in CHANNELS.items():
        for channels, size in zip(widths, SIZES):
            records += measure(groups, channels, size, args.rounds)
    print('outputs and gradients agree within 1e-4')
    write_json(args, records)


if __name__ == '__main__':
    main()
