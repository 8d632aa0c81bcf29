"""COCO evaluation of images with 100 detections each: CocoMetric with pycocotools, and as it is.

    python benchmarks/evaluation.py --case 5000 --rounds 1

A step is all that follows the network: masks from probabilities to RLE (ours for both), taking up each
prediction, records, COCO evaluation of boxes and masks, tables. All 24 numbers must agree.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Peer, Step, common_parser, main
from mmengine.logging import MMLogger

from mmdet.evaluation import CocoMetric
from mmdet.evaluation.coco_eval import BACKENDS
from mmdet.structures.masks import paste_masks

HEIGHT, WIDTH, CLASSES, OBJECTS, DETECTIONS = 480, 640, 80, 7, 100


def make_images(count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO annotation file of elliptic objects, predictions around them, and ``peaks`` of their masks."""
    random = np.random.default_rng(0)
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
        predictions.append(dict(
            img_id=image_id, img_path='', ori_shape=(HEIGHT, WIDTH), boxes=boxes,
            scores=torch.from_numpy(random.random(DETECTIONS)).float(),
            labels=torch.from_numpy(np.where(random.random(DETECTIONS) < 0.7, labels[chosen], wrong)),
            peaks=torch.from_numpy(random.uniform(0.6, 1, (DETECTIONS, 1, 1))).float()))
    return content, predictions


def prepare(args: argparse.Namespace, backend: str) -> Step:
    MMLogger.get_instance('mmengine', log_level='ERROR')
    content, predictions = make_images(int(args.case))
    y, x = np.mgrid[:28, :28] / 13.5 - 1
    ellipse = torch.from_numpy(1 / (1 + np.exp(8 * (x**2 + y**2 - 1)))).float()
    file = tempfile.NamedTemporaryFile('w', suffix='.json')
    json.dump(content, file)
    file.flush()

    def step() -> Any:
        metric = CocoMetric(ann_file=file.name, eval_backend=backend)
        metric.dataset_meta = dict(cat_ids=range(CLASSES))
        for prediction in predictions:
            masks = paste_masks(ellipse * prediction['peaks'], prediction['boxes'], (HEIGHT, WIDTH), 0.5)
            metric.process(None, [prediction | dict(masks=masks)])
        return metric.evaluate(len(predictions))
    return step


def agree(args: argparse.Namespace, results: dict[str, Any]) -> Iterable[str]:
    first, *others = results
    for name in others:
        if results[name] != results[first]:
            raise SystemExit(f'error: {name} gives other numbers than {first}')
    yield (f'{" and ".join(results)}: box AP {results[first]["coco/bbox_mAP"]:.3f}, '
           f'mask AP {results[first]["coco/segm_mAP"]:.3f}, all {len(results[first])} numbers the same')


PEERS: dict[str, Peer] = {name: partial(prepare, backend=name) for name in reversed(BACKENDS)}

if __name__ == '__main__':
    parser = common_parser(__doc__)
    parser.set_defaults(device='cpu')
    main(parser, PEERS, ['5000', '1000'], agree, lambda args, case: {})
