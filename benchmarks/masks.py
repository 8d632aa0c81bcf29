"""Masks of 100 detections to COCO RLE: `mmdet.ops.paste_masks` against PyTorch and pycocotools.

    python benchmarks/masks.py [--out masks.json]

The other side does what mmdetection 3.3 does on a CPU: `grid_sample` over the box of one mask at a time into
a boolean image of its own, and pycocotools' `encode` of each image. Both must give the same bytes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
    images = torch.zeros(len(masks), HEIGHT, WIDTH, dtype=torch.bool)
    for image, mask, box in zip(images, masks, boxes):
        x1, y1, x2, y2 = box.tolist()
        left, right = max(int(x1) - 1, 0), min(int(np.ceil(x2)) + 1, WIDTH)
        top, bottom = max(int(y1) - 1, 0), min(int(np.ceil(y2)) + 1, HEIGHT)
        x = (torch.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        sampled = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        image[top:bottom, left:right] = sampled >= THRESHOLD
    return [coco_mask.encode(np.asfortranarray(image, np.uint8)) for image in images.numpy()]


def compiled(masks: Tensor, boxes: Tensor) -> list[RLE]:
    return paste_masks(masks, boxes, (HEIGHT, WIDTH), THRESHOLD)


def milliseconds(function, *args: Tensor) -> float:
    begin = time.perf_counter()
    function(*args)
    return (time.perf_counter() - begin) * 1000


def compare(masks: Tensor, boxes: Tensor, repeats: int) -> dict[str, float]:
    """Medians of both in alternation, and the median and quartiles of their ratio."""
    if eager(masks, boxes) != compiled(masks, boxes):
        raise RuntimeError('the masks differ')
    times = [(milliseconds(eager, masks, boxes), milliseconds(compiled, masks, boxes))
             for _ in range(repeats)]
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return dict(eager_ms=statistics.median(a for a, _ in times), op_ms=statistics.median(b for _, b in times),
                ratio=middle, ratio_q1=low, ratio_q3=high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--out', type=Path, metavar='FILE.json')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report = {name: compare(*make_detections(100, sides), args.repeats) for name, sides in SIDES.items()}
    print(f'100 masks on {WIDTH} x {HEIGHT}, {args.threads} threads, the same bytes from both')
    for name, row in report.items():
        print(f'{name:>6} boxes: eager {row["eager_ms"]:7.2f} ms, op {row["op_ms"]:6.2f} ms, '
              f'{row["ratio"]:5.1f} times as fast (quartiles {row["ratio_q1"]:.1f} to {row["ratio_q3"]:.1f})')
    if args.out:
        args.out.write_text(json.dumps(
            dict(threads=args.threads, torch=torch.__version__, masks=report), indent=1))


if __name__ == '__main__':
    main()
