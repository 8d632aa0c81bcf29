"""Masks of 100 detections to COCO RLE: `mmdet.ops.paste_masks` against PyTorch and pycocotools.

The other side does, on a GPU too, what mmdetection 3.3 does on a CPU: `grid_sample` over the box of one mask
at a time into a boolean image of its own, and pycocotools' `encode` of each. Both must give the same bytes.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from alternate import compare, op_parser
from common import write_json
from pycocotools import mask as coco_mask
from torch import Tensor

from mmdet.structures.masks import RLE, paste_masks

HEIGHT, WIDTH, THRESHOLD = 480, 640, 0.5
SIDES = dict(small=(8, 32), mixed=(8, 400), large=(250, 470))  # pixels, log-uniform


def make_detections(count: int, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Smooth random probabilities (N, 28, 28) and boxes (N, 4) inside the image."""
    low, high = np.log(sides)
    size = torch.exp(torch.rand(count, 2) * (high - low) + low)
    corner = torch.rand(count, 2) * (torch.tensor([WIDTH, HEIGHT]) - size)
    blobs = F.interpolate(torch.randn(count, 1, 6, 6), size=28, mode='bicubic')[:, 0]
    return (blobs * 3).sigmoid(), torch.cat([corner, corner + size], 1)


def eager(masks: Tensor, boxes: Tensor) -> list[RLE]:
    device = masks.device
    images = torch.zeros(len(masks), HEIGHT, WIDTH, dtype=torch.bool, device=device)
    for image, mask, box in zip(images, masks, boxes):
        x1, y1, x2, y2 = box.tolist()
        left, right = max(int(x1) - 1, 0), min(int(np.ceil(x2)) + 1, WIDTH)
        top, bottom = max(int(y1) - 1, 0), min(int(np.ceil(y2)) + 1, HEIGHT)
        x = (torch.arange(left, right, device=device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom, device=device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        sampled = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        image[top:bottom, left:right] = sampled >= THRESHOLD
    return [coco_mask.encode(np.asfortranarray(image, np.uint8)) for image in images.cpu().numpy()]


def main() -> None:
    args = op_parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    for name, sides in SIDES.items():
        masks, boxes = (part.to(args.device) for part in make_detections(100, sides))
        functions = {'PyTorch and pycocotools': partial(eager, masks, boxes),
                     'mmdet': partial(paste_masks, masks, boxes, (HEIGHT, WIDTH), THRESHOLD)}
        found, expected = (function() for function in functions.values())
        assert found == expected, 'the masks differ'
        records += compare(f'100 {name} boxes on {WIDTH} x {HEIGHT}', functions, args.rounds)
    print('the same bytes from both')
    write_json(args, records)


if __name__ == '__main__':
    main()
