"""RoIAlign against torchvision's: [2, 256, 200, 336], sides of 16 to 181 pixels at stride 4, 7 x 7 bins."""

from functools import partial

import torch
import torchvision
from alternate import compare, op_parser
from common import positive, write_json
from torch import Tensor

from mmdet.ops import roi_align


def make_rois(count: int) -> Tensor:
    """RoIs (count, 5) inside two images of 1344 x 800 pixels."""
    size = torch.tensor([1344.0, 800.0])
    sides = 2 ** (torch.rand(count, 2) * 3.5 + 4)
    corner = torch.rand(count, 2) * (size - sides)
    return torch.cat([torch.arange(count)[:, None] % 2, corner, corner + sides], dim=1)


def main() -> None:
    parser = op_parser(__doc__)
    parser.add_argument('--rois', type=positive, default=512)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    planes, rois = torch.randn(2, 256, 200, 336, device=args.device), make_rois(args.rois).to(args.device)
    weight = torch.randn(args.rois, 256, 7, 7, device=args.device)
    cells = planes.contiguous(memory_format=torch.channels_last)
    variants = {
        'torchvision': (torchvision.ops.roi_align, planes),
        'torchvision channels_last': (torchvision.ops.roi_align, cells),
        'mmdet': (roi_align, planes),
        'mmdet channels_last': (roi_align, cells),
    }
    # On a GPU torchvision fuses the product and sum that place a sample: here a rounding of 3e-5 cells.
    bound = 1e-5 if args.device == 'cpu' else 3e-4
    records = []
    for ratio in (2, 0):
        forward, backward, results = {}, {}, []
        for name, (op, x) in variants.items():
            leaf = x.detach().requires_grad_()
            output = op(leaf, rois, 7, 1 / 4, ratio, True)
            forward[name] = partial(op, x, rois, 7, 1 / 4, ratio, True)
            backward[name] = partial(torch.autograd.grad, output, leaf, weight, retain_graph=True)
            results.append((output.detach(), *backward[name]()))
        for found in results:
            for part, expected in zip(found, results[0]):
                scale = expected.abs().max().item()
                torch.testing.assert_close(part, expected, rtol=bound, atol=bound * scale)
        case = 'adaptive samples' if ratio == 0 else f'{ratio} x {ratio} samples'
        records += compare(f'{case}, forward', forward, args.rounds)
        records += compare(f'{case}, backward', backward, args.rounds)
    print(f'outputs and gradients agree within {bound:g}')
    write_json(args, records)


if __name__ == '__main__':
    main()
