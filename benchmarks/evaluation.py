"""COCO evaluation of 5,000 images with 100 detections each: CocoMetric as it is, and with pycocotools.

    python benchmarks/evaluation.py [--images 5000] [--backends hotcoco pycocotools] [--out evaluation.json]

Measures what follows the network: masks to RLE; then taking up each prediction, records, COCO evaluation of
boxes and masks, tables. Each backend runs in a process of its own on the same predictions; all 24 numbers
must agree.
"""

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from common import out_parser, positive, write_json
from mmengine.logging import MMLogger

from mmdet.evaluation import CocoMetric
from mmdet.evaluation.coco_eval import BACKENDS
from mmdet.structures.masks import paste_masks

HEIGHT, WIDTH, CLASSES, OBJECTS, DETECTIONS = 480, 640, 80, 7, 100


def make_images(count: int) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """A COCO annotation file of elliptic objects, predictions around them, and the time of their masks."""
    mask_seconds = 0.0
    random = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28] / 13.5 - 1
    ellipse = torch.from_numpy(1 / (1 + np.exp(8 * (x**2 + y**2 - 1)))).float()
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    content: dict[str, Any] = dict(
        images=[], annotations=[], categories=[dict(id=i, name=f'class {i}') for i in range(CLASSES)])
    predictions = []
    for image_id in range(count):
        content['images'].append(dict(id=image_id, height=HEIGHT, width=WIDTH))
        size = np.exp(random.uniform(np.log(12), np.log(300), (OBJECTS, 2)))
        corner = random.random((OBJECTS, 2)) * (np.array([WIDTH, HEIGHT]) - size)
        labels = random.integers(0, CLASSES, OBJECTS)
        for label, (x1, y1), (w, h) in zip(labels.tolist(), corner.tolist(), size.tolist()):
            points = np.stack([x1 + w / 2 * (1 + np.cos(angles)), y1 + h / 2 * (1 + np.sin(angles))], 1)
            content['annotations'].append(dict(
                id=len(content['annotations']) + 1, image_id=image_id, category_id=label, iscrowd=0,
                bbox=[x1, y1, w, h], area=w * h * np.pi / 4, segmentation=[points.ravel().tolist()]))
        chosen = random.integers(0, OBJECTS, DETECTIONS)
        moved = corner[chosen] + random.normal(0, 0.1, (DETECTIONS, 2)) * size[chosen]
        scaled = size[chosen] * np.exp(random.normal(0, 0.1, (DETECTIONS, 2)))
        boxes = torch.from_numpy(np.concatenate([moved, moved + scaled], 1)).float()
        wrong = random.integers(0, CLASSES, DETECTIONS)
        masks = ellipse * torch.from_numpy(random.uniform(0.6, 1, (DETECTIONS, 1, 1))).float()
        begin = time.perf_counter()
        rles = paste_masks(masks, boxes, (HEIGHT, WIDTH), 0.5)
        mask_seconds += time.perf_counter() - begin
        predictions.append(dict(
            img_id=image_id, img_path='', ori_shape=(HEIGHT, WIDTH), boxes=boxes,
            scores=torch.from_numpy(random.random(DETECTIONS)).float(),
            labels=torch.from_numpy(np.where(random.random(DETECTIONS) < 0.7, labels[chosen], wrong)),
            masks=rles))
    return content, predictions, mask_seconds


def evaluate(backend: str, images: int, repeats: int) -> dict[str, Any]:
    """Seconds of each run, the peak of the process's memory and the numbers."""
    MMLogger.get_instance('mmengine', log_level='ERROR')
    content, predictions, mask_seconds = make_images(images)
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(content, file)
        file.flush()
        return dict(measure(backend, file.name, predictions, repeats), mask_seconds=mask_seconds)


def measure(backend: str, ann_file: str, predictions: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    seconds, numbers = [], {}
    for _ in range(repeats):
        metric = CocoMetric(ann_file=ann_file, eval_backend=backend)
        metric.dataset_meta = dict(cat_ids=range(CLASSES))
        begin = time.perf_counter()
        for prediction in predictions:
            metric.process(None, [prediction])
        numbers = metric.evaluate(len(predictions))
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return dict(seconds=seconds, peak_gb=peak, numbers=numbers)


def main() -> None:
    parser = out_parser(__doc__)
    parser.add_argument('--images', type=positive, default=5000)
    parser.add_argument('--repeats', type=positive, default=1)
    parser.add_argument('--backends', nargs='+', choices=list(BACKENDS), default=list(BACKENDS))
    args = parser.parse_args()
    report = {}
    for backend in args.backends:
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            report[backend] = pool.apply(evaluate, (backend, args.images, args.repeats))
    first = report[args.backends[0]]
    print(f'{args.images} images, {args.images * DETECTIONS} detections: box AP '
          f'{first["numbers"]["coco/bbox_mAP"]:.3f}, mask AP {first["numbers"]["coco/segm_mAP"]:.3f}')
    print(f'   {"masks":>9}: {first["mask_seconds"]:7.1f} s from probabilities and boxes to COCO RLE')
    for backend, row in report.items():
        if row['numbers'] != first['numbers']:
            raise RuntimeError(f'{backend} gives other numbers than {args.backends[0]}')
        middle = statistics.median(row['seconds'])
        print(f'{backend:>12}: {middle:7.1f} s ({min(row["seconds"]):.1f} to {max(row["seconds"]):.1f}), '
              f'peak {row["peak_gb"]:.2f} GB, '
              f'{middle / statistics.median(first["seconds"]):5.1f} times as long as {args.backends[0]}')
    write_json(args, [dict(row, backend=backend) for backend, row in report.items()])


if __name__ == '__main__':
    main()
