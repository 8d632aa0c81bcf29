"""Targets of a mask head for 128 RoIs of an image: `mmdet.ops.mask_targets` against torchvision.

torchvision samples bitmaps of the whole image, in floating point; ours are crops of the objects. Bins
must agree wherever torchvision's mean is not 0.5 up to rounding.
"""

from functools import partial

import torch
from alternate import compare, op_parser
from common import write_json
from torch import Tensor
from torchvision.ops import roi_align

from mmdet.ops import mask_targets
from mmdet.structures.masks import MaskCrops, masks_to_bitmaps

HEIGHT, WIDTH, SIZE, ROIS = 800, 1088, 28, 128
SIDE = 40, 400  # pixels of an object


def make_objects(count: int) -> MaskCrops:
    """Ellipses."""
    size = torch.randint(*SIDE, (count, 2))
    corner = (torch.rand(count, 2) * (torch.tensor([WIDTH, HEIGHT]) - size)).long()
    boxes = torch.cat([corner, corner + size], 1)
    pixels, rows, first = [], [], 0
    for x1, y1, x2, y2 in boxes.tolist():
        y, x = torch.linspace(-1, 1, y2 - y1)[:, None], torch.linspace(-1, 1, x2 - x1)
        crop = (y**2 + x**2 <= 1).to(torch.uint8)
        pixels.append(crop.flatten())
        rows.append([first, x1, y1, x2, y2])
        first += crop.numel()
    return MaskCrops(torch.cat(pixels), torch.tensor(rows))


def from_bitmaps(bitmaps: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], 1)
    return roi_align(bitmaps[:, None].to(boxes.dtype), rois, SIZE, 1.0, aligned=True)[:, 0]


def main() -> None:
    args = op_parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    for count in (2, 8, 32):
        masks = MaskCrops(*(part.to(args.device) for part in make_objects(count)))
        bitmaps = masks_to_bitmaps(masks, (HEIGHT, WIDTH))
        matched = torch.arange(ROIS, device=args.device) % count
        moved = 20 * torch.randn(ROIS, 4, device=args.device)
        boxes = masks.crops[matched, 1:] + moved.clamp(-18, 18)  # narrower than half of the smallest object
        mean = from_bitmaps(bitmaps, boxes, matched)
        found = mask_targets(*masks, boxes, matched, (HEIGHT, WIDTH), SIZE)
        clear = (mean - 0.5).abs() > 1e-5
        assert torch.equal(found[clear], (mean >= 0.5)[clear]), 'the targets differ'
        functions = {
            'torchvision': partial(from_bitmaps, bitmaps, boxes, matched),
            'mmdet': partial(mask_targets, *masks, boxes, matched, (HEIGHT, WIDTH), SIZE)}
        records += compare(f'{ROIS} RoIs of {count} objects', functions, args.rounds)
    print('the same targets from both')
    write_json(args, records)


if __name__ == '__main__':
    main()
