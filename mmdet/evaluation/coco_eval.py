"""COCO evaluation of result records against an annotation file, as free functions.

Records are what a COCO result file holds (cocodataset.org/#format-results): ``bbox`` records have
``image_id, category_id, bbox [x, y, w, h], score``, ``segm`` records a ``segmentation`` (COCO RLE)
in place of the box.
"""

import io
import math
from contextlib import redirect_stdout
from numbers import Real
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
from mmengine.logging import print_log

from mmdet.structures.masks import segmentation_problem, segmentation_to_rle

BACKENDS = {
    'hotcoco': (hotcoco.COCO, hotcoco.COCOeval),
    'pycocotools': (pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval),
}
IOU_TYPES = ('bbox', 'segm')
# Name, kind, IoU thresholds, areas and detections an image of COCOeval's twelve numbers, in its order.
_STATS = (
    ('mAP', 'AP', '0.50:0.95', 'all', 100),
    ('mAP_50', 'AP', '0.50', 'all', 100),
    ('mAP_75', 'AP', '0.75', 'all', 100),
    ('mAP_s', 'AP', '0.50:0.95', 'small', 100),
    ('mAP_m', 'AP', '0.50:0.95', 'medium', 100),
    ('mAP_l', 'AP', '0.50:0.95', 'large', 100),
    ('AR@1', 'AR', '0.50:0.95', 'all', 1),
    ('AR@10', 'AR', '0.50:0.95', 'all', 10),
    ('AR@100', 'AR', '0.50:0.95', 'all', 100),
    ('AR_s@100', 'AR', '0.50:0.95', 'small', 100),
    ('AR_m@100', 'AR', '0.50:0.95', 'medium', 100),
    ('AR_l@100', 'AR', '0.50:0.95', 'large', 100),
)
STAT_NAMES = tuple(stat[0] for stat in _STATS)


class Scores(NamedTuple):
    """What COCOeval says about one kind of result; -1 stands for "no ground truth of this kind"."""

    stats: np.ndarray
    """(12,) float64, in the order of ``STAT_NAMES``."""
    class_ap: np.ndarray
    """(K, 3) float64: AP, AP50, AP75 of each category, by increasing category id."""


def select_ground_truth(content: dict[str, Any], img_ids: list[int], cat_ids: list[int]) -> dict[str, Any]:
    """The part of an annotation file that concerns these images and categories, fit for COCOeval.

    Annotations are numbered anew from 1: COCOeval never matches id 0, and of several annotations
    with one id it sees only the last. ``iscrowd`` and ``area``, which it takes for granted, are
    filled in where absent (not a crowd; the box's area). Of images and categories only what it needs
    stays: hotcoco takes no other types than the format has for the rest, as in ``date_captured``.
    """
    images = {image['id']: image for image in content['images']}
    if unknown := [i for i in img_ids if i not in images]:
        raise ValueError(f'image id {unknown[0]} of the results is not in the annotation file')
    categories = {category['id']: category for category in content['categories']}
    if unknown := [i for i in cat_ids if i not in categories]:
        raise ValueError(f'category id {unknown[0]} of the results is not in the annotation file')

    ids = [annotation.get('id') for annotation in content['annotations']]
    if repeated := len(ids) - len(set(ids)):
        print_log(f'{repeated} annotation ids are used twice: each annotation is evaluated, '
                  'while pycocotools alone would see the last of an id only', logger='current')

    wanted_images, wanted_categories = set(img_ids), set(cat_ids)
    annotations: list[dict[str, Any]] = []
    for annotation in content['annotations']:
        if annotation['image_id'] in wanted_images and annotation['category_id'] in wanted_categories:
            box, area = annotation.get('bbox') or [], annotation.get('area')
            numbers = [*box, *([] if area is None else [area])]
            if len(box) != 4 or not all(isinstance(n, Real) and math.isfinite(n) for n in numbers):
                raise ValueError(f'annotation {annotation.get("id")} of image {annotation["image_id"]} '
                                 f'has no valid bbox [x, y, w, h] or area: {box}, {area}')
            annotations.append(dict(
                id=len(annotations) + 1,
                image_id=annotation['image_id'],
                category_id=annotation['category_id'],
                bbox=box,
                area=box[2] * box[3] if area is None else area,
                iscrowd=int(annotation.get('iscrowd') or 0),
                segmentation=annotation.get('segmentation')))

    def needed(records: list[dict[str, Any]], wanted: set[int], *keys: str) -> list[dict[str, Any]]:
        return [{key: record[key] for key in ('id', *keys) if record.get(key) is not None}
                for record in records if record['id'] in wanted]

    return dict(
        images=needed(content['images'], wanted_images, 'height', 'width'),
        categories=needed(content['categories'], wanted_categories, 'name'),
        annotations=annotations)


def check_masks(ground_truth: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Raise ValueError where COCOeval would fail on masks, or find no overlap without a word."""
    sizes = {image['id']: [image['height'], image['width']] for image in ground_truth['images']}
    for annotation in ground_truth['annotations']:
        segmentation = annotation['segmentation']
        problem = segmentation_problem(segmentation, *sizes[annotation['image_id']])
        if not problem and isinstance(segmentation, list) and len(segmentation[0]) < 6:
            problem = 'has a polygon of fewer than 3 points'
        if problem:
            raise ValueError(f'the annotation of image id {annotation["image_id"]} with bbox '
                             f'{annotation["bbox"]} {problem}: segm cannot be evaluated')
    for record in records:
        size = list(record['segmentation']['size'])
        if size != sizes[record['image_id']]:
            raise ValueError(f'image id {record["image_id"]}: masks are {size} (height, width), but the '
                             f'annotation file says {sizes[record["image_id"]]}')


def run_coco_eval(ground_truth: dict[str, Any], records: list[dict[str, Any]], iou_type: str,
                  backend: str = 'hotcoco') -> Scores:
    """The twelve COCO numbers of ``records``.

    Args:
        ground_truth: from ``select_ground_truth``.
        records: bbox or segm records on images and categories of the ground truth.
        iou_type: 'bbox' or 'segm'.
        backend: 'hotcoco' or 'pycocotools', which give the same numbers to the bit.
    """
    if iou_type == 'segm':
        check_masks(ground_truth, records)
    coco_class, eval_class = BACKENDS[backend]
    # pycocotools writes into the dicts that it is given, hence the copies. Boxes need no valid segmentation.
    hidden: dict[str, Any] = {} if iou_type == 'segm' else dict(segmentation=[])
    truth = dict(ground_truth, annotations=[a | hidden for a in ground_truth['annotations']])
    with redirect_stdout(io.StringIO()):
        coco = _index(coco_class, truth)
        # pycocotools fails on an empty list of results.
        lines = records if backend == 'hotcoco' else [dict(r) for r in records]
        detections = (coco.loadRes(lines) if records
                      else _index(coco_class, dict(truth, annotations=[])))
        evaluator = eval_class(coco, detections, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    # (T, R, K, A, M): IoU thresholds .5:.05:.95, recalls, categories, area ranges, maximum detections.
    precision = evaluator.eval['precision'][:, :, :, 0, -1]
    class_ap = [[_mean(precision[t, :, k]) for t in (slice(None), 0, 5)] for k in range(precision.shape[2])]
    return Scores(np.asarray(evaluator.stats), np.array(class_ap).reshape(-1, 3))


def summary_lines(stats: np.ndarray) -> list[str]:
    """The twelve numbers in the form that pycocotools prints."""
    titles = dict(AP='Average Precision', AR='Average Recall')
    return [f' {titles[kind]:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6} | maxDets={count:>3} ] = '
            f'{value:0.3f}' for (_, kind, iou, area, count), value in zip(_STATS, stats)]


def _index(coco_class: Any, content: dict[str, Any]) -> Any:
    coco = coco_class()
    coco.dataset = content
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0


def count_matches(ground_truth: dict[str, Any], records: list[dict[str, Any]], iou_type: str,
                  iou_threshold: float = 0.5) -> int:
    """How many ground truths (crowds excluded) some detection of any class overlaps by the threshold."""
    images = {image['id']: image for image in ground_truth['images']}
    truths: dict[int, list] = {}
    for annotation in ground_truth['annotations']:
        if not annotation['iscrowd']:
            truths.setdefault(annotation['image_id'], []).append(annotation)
    found: dict[int, list] = {}
    for record in records:
        found.setdefault(record['image_id'], []).append(record)

    matches = 0
    for image_id in truths.keys() & found.keys():
        if iou_type == 'bbox':
            objects = [a['bbox'] for a in truths[image_id]]
            detections = [r['bbox'] for r in found[image_id]]
        else:
            height, width = images[image_id]['height'], images[image_id]['width']
            objects = [segmentation_to_rle(a['segmentation'], height, width) for a in truths[image_id]]
            detections = [r['segmentation'] for r in found[image_id]]
        ious = pycocotools.mask.iou(detections, objects, [0] * len(objects))
        matches += int((ious >= iou_threshold).any(axis=0).sum())
    return matches
