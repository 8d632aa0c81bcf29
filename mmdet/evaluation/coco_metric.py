"""The metric that runs after testing: files of results, COCO numbers, tables, diagnosis."""

import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import broadcast_object_list, gather_object, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from terminaltables import AsciiTable
from torch import Tensor

from mmdet.registry import METRICS
from mmdet.structures.masks import finished
from mmdet.utils.coco_file import read_annotation_file
from mmdet.utils.env import paused_gc
from mmdet.utils.files import write_file

from .coco_eval import (
    BACKENDS,
    IOU_TYPES,
    STAT_NAMES,
    Scores,
    check_masks,
    count_matches,
    run_coco_eval,
    select_ground_truth,
    summary_lines,
)


@METRICS.register_module()
class CocoMetric(BaseMetric):
    """COCO AP and AR of boxes and masks (cocodataset.org/#detection-eval).

    Takes the model's prediction dicts (``img_id, img_path, ori_shape, boxes, scores, labels`` and,
    from models with masks, ``masks``) image by image and keeps them as NumPy arrays and RLE. The
    main process then writes the files asked for and evaluates the images that were tested.
    ``dataset_meta`` (set by the runner) holds ``classes``, ``cat_ids`` and ``ann_file``.

    Args:
        metric: 'bbox', 'segm', a list of them, or [] to write files only.
        ann_file: COCO annotation file; by default that of the data set.
        classwise: whether to print a table with the AP of each class.
        eval_backend: 'hotcoco' or 'pycocotools'; both give the same numbers.
        outfile_prefix: writes COCO result files PREFIX.bbox.json and, where there are masks,
            PREFIX.segm.json.
        out: writes the predictions to this pickle file (.pkl or .pickle): a list in data set order
            of prediction dicts that hold plain types and NumPy arrays only.
        prefix: what precedes '/' in the names of the numbers.
    """

    default_prefix = 'coco'

    def __init__(self,
                 metric: str | Sequence[str] = ('bbox', 'segm'),
                 ann_file: str | None = None,
                 classwise: bool = True,
                 eval_backend: str = 'hotcoco',
                 outfile_prefix: str | None = None,
                 out: str | None = None,
                 prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        if unknown := set(self.metrics) - set(IOU_TYPES):
            raise ValueError(f'metric {min(unknown)!r} is not known: choose from {", ".join(IOU_TYPES)}')
        if eval_backend not in BACKENDS:
            raise ValueError(f'eval_backend {eval_backend!r} is not known: choose from {", ".join(BACKENDS)}')
        if out is not None and not out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'out {out!r} must end with .pkl or .pickle')
        # What cannot be written shows before the test, not after.
        if out is not None and Path(out).is_dir():
            raise ValueError(f'out {out} is a folder: give a file')
        if outfile_prefix is not None and not os.path.basename(outfile_prefix).strip('.'):
            raise ValueError(f'outfile_prefix {outfile_prefix!r} must end with the beginning of a file name')
        for path in (out, outfile_prefix):
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.ann_file = ann_file
        self.classwise = classwise
        self.eval_backend = eval_backend
        self.outfile_prefix = outfile_prefix
        self.out = out
        self._last: Sequence[dict[str, Any]] = ()

    def _data_set(self) -> tuple[str, list[int]]:
        """The annotation file and the category ids of the classes."""
        meta = self.dataset_meta or {}
        ann_file = self.ann_file or meta.get('ann_file')
        if 'cat_ids' not in meta or ann_file is None:
            raise ValueError('CocoMetric needs a COCO data set, whose metainfo has cat_ids and ann_file')
        return ann_file, list(meta['cat_ids'])

    def check_annotations(self, img_ids: list[int]) -> None:
        """Find out before a test of these images whether it can be evaluated.

        Raises:
            ValueError: an annotation cannot be evaluated, or an image is not in the annotation file.
        """
        ann_file, cat_ids = self._data_set()
        ground_truth = select_ground_truth(read_annotation_file(ann_file), img_ids, cat_ids)
        if 'segm' in self.metrics:
            check_masks(ground_truth, [])

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the predictions of one batch; if masks are still being encoded, when the next one comes.

        Raises:
            ValueError: a box or score is not finite, a box ends before it starts, or masks are
                asked for and the model gives none.
        """
        self._keep()
        self._last = data_samples
        if not any(isinstance(prediction.get('masks'), Future) for prediction in data_samples):
            self._keep()

    def _keep(self) -> None:
        for prediction in self._last:
            prediction = to_numpy(prediction)
            check_prediction(prediction, with_masks='segm' in self.metrics)
            self.results.append(prediction)
        self._last = ()

    def evaluate(self, size: int) -> dict[str, float]:
        """The numbers, on every process; ``size`` images make up the data set.

        Gathers over the network, where mmengine's own way leaves files in the working directory
        and needs it writable and common to all machines.
        """
        self._keep()
        parts = gather_object(self.results)
        metrics: list[Any] = [None]
        if is_main_process():
            with paused_gc():
                numbers = self.compute_metrics(interleave(parts or [])[:size])
            metrics = [{f'{self.prefix}/{name}': value for name, value in numbers.items()}]
        broadcast_object_list(metrics)
        self.results.clear()
        return metrics[0]

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Write the files, then evaluate ``results``, one prediction an image in data set order.

        Returns:
            ``bbox_mAP``, ``bbox_mAP_50``, ..., ``bbox_AR@1``, ... and the same for ``segm``; -1
            where there is no ground truth of that kind.

        Raises:
            ValueError: the results do not fit the annotation file.
            OSError: a file could not be written; the numbers have been logged all the same.
        """
        failure = None
        for path, content in self._files(results):
            try:
                write_file(Path(path), content)
                print_log(f'Wrote {path}', logger='current')
            except OSError as error:
                failure = error  # an evaluation needs no disk
                print_log(f'{path} was not written: {error}', logger='current', level=logging.ERROR)
        numbers = self._evaluate(results) if self.metrics else {}
        if failure is not None:
            raise failure
        return numbers

    def _files(self, results: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        """Path and content of each file to write."""
        if self.out is not None:
            yield self.out, pickle.dumps(results)
        if self.outfile_prefix is not None:
            for iou_type in iou_types(results):
                lines = to_records(results, self._data_set()[1], iou_type)
                yield f'{self.outfile_prefix}.{iou_type}.json', json.dumps(lines).encode()

    def _evaluate(self, results: list[dict[str, Any]]) -> dict[str, float]:
        ann_file, cat_ids = self._data_set()
        img_ids = [prediction['img_id'] for prediction in results]
        if repeated := [i for i, count in Counter(img_ids).items() if count > 1]:
            raise ValueError(f'image id {repeated[0]} has {Counter(img_ids)[repeated[0]]} results, not one')
        content = read_annotation_file(ann_file)
        if len(img_ids) < len(content['images']):
            print_log(f'Evaluating the {len(img_ids)} images tested, of {len(content["images"])} in '
                      f'{ann_file}', logger='current')
        ground_truth = select_ground_truth(content, img_ids, cat_ids)

        numbers: dict[str, float] = {}
        for metric in self.metrics:
            if metric not in iou_types(results):
                raise ValueError(f'metric {metric!r} needs masks, but the results have none')
            records = to_records(results, cat_ids, metric)
            scores = run_coco_eval(ground_truth, records, metric, self.eval_backend)
            summary = '\n'.join(summary_lines(scores.stats))
            print_log(f'Evaluation of {metric} ({self.eval_backend})\n{summary}', logger='current')
            if self.classwise:
                table = class_table(ground_truth, records, scores)
                print_log(f'{metric} AP by class\n{table}', logger='current')
            if warning := diagnose(ground_truth, records, metric, scores):
                print_log(warning, logger='current', level=logging.WARNING)
            numbers |= {f'{metric}_{name}': float(value) for name, value in zip(STAT_NAMES, scores.stats)}
        return numbers


def check_annotations(loop: Any) -> None:
    """Find out before a validation or test loop whether it can be evaluated.

    Raises:
        ValueError: as ``CocoMetric.check_annotations``, or the model has no masks to evaluate.
    """
    dataset, model = loop.dataloader.dataset, loop.runner.model
    roi_head = getattr(getattr(model, 'module', model), 'roi_head', None)
    for metric in loop.evaluator.metrics:
        if isinstance(metric, CocoMetric):
            if 'segm' in metric.metrics and getattr(roi_head, 'mask_head', True) is None:
                raise ValueError("metric 'segm' needs masks, but model.roi_head.mask_head=None: "
                                 "evaluate 'bbox' alone")
            metric.check_annotations([dataset.get_data_info(i)['img_id'] for i in range(len(dataset))])


def to_numpy(prediction: dict[str, Any]) -> dict[str, Any]:
    """A prediction dict with its tensors as NumPy arrays: boxes and scores float32, labels int64."""
    arrays = {key: value.detach().cpu().numpy() if isinstance(value, Tensor) else value
              for key, value in finished(prediction).items()}
    return arrays | dict(
        boxes=np.asarray(arrays['boxes'], np.float32).reshape(-1, 4),
        scores=np.asarray(arrays['scores'], np.float32),
        labels=np.asarray(arrays['labels'], np.int64))


def check_prediction(prediction: dict[str, Any], with_masks: bool) -> None:
    """Raise ValueError on what COCOeval would turn into a wrong number: it scores NaN as a perfect hit."""
    image = f'image id {prediction["img_id"]}'
    for key in ('boxes', 'scores'):
        if not np.isfinite(prediction[key]).all():
            raise ValueError(f'{image}: {key} hold NaN or infinite values; has the training diverged?')
    boxes = prediction['boxes']
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(f'{image}: boxes must be x1 <= x2, y1 <= y2 in pixels')
    keys = ('boxes', 'scores', 'labels', 'masks')
    counts = {key: len(prediction[key]) for key in keys if key in prediction}
    if len(set(counts.values())) > 1:
        raise ValueError(f'{image}: different numbers of {counts}')
    if with_masks and 'masks' not in prediction:
        raise ValueError(f"{image}: metric 'segm' needs masks, but there are only boxes; use metric 'bbox'")


def interleave(parts: list[list[Any]]) -> list[Any]:
    """Item i of every part, in turn: the order of the data set, of which process r of n tested r::n."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def iou_types(results: list[dict[str, Any]]) -> list[str]:
    """The kinds of records that the predictions can be turned into."""
    with_masks = results and all('masks' in prediction for prediction in results)
    return ['bbox', 'segm'] if with_masks else ['bbox']


def to_records(results: list[dict[str, Any]], cat_ids: list[int], iou_type: str) -> list[dict[str, Any]]:
    """COCO result records of the predictions, of kind 'bbox' or 'segm'."""
    key = 'bbox' if iou_type == 'bbox' else 'segmentation'
    records: list[dict[str, Any]] = []
    for prediction in results:
        image_id, labels = prediction['img_id'], prediction['labels'].tolist()
        if labels and not 0 <= min(labels) <= max(labels) < len(cat_ids):
            raise ValueError(f'image id {image_id}: labels reach from {min(labels)} to {max(labels)}, '
                             f'but the data set has {len(cat_ids)} classes')
        scores = prediction['scores'].tolist()
        if iou_type == 'bbox':
            boxes = prediction['boxes'].tolist()
            shapes: list[Any] = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]
        else:
            shapes = [dict(size=list(m['size']), counts=m['counts'].decode()) for m in prediction['masks']]
        records += [{'image_id': image_id, 'category_id': cat_ids[label], key: shape, 'score': score}
                    for label, shape, score in zip(labels, shapes, scores)]
    return records


def class_table(ground_truth: dict[str, Any], records: list[dict[str, Any]], scores: Scores) -> str:
    """One row a category: number of objects (crowds excluded) and detections, AP, AP50, AP75."""
    objects = Counter(a['category_id'] for a in ground_truth['annotations'] if not a['iscrowd'])
    detections = Counter(record['category_id'] for record in records)
    rows = [['class', 'objects', 'detections', 'AP', 'AP50', 'AP75']]
    for category, numbers in zip(sorted(ground_truth['categories'], key=lambda c: c['id']), scores.class_ap):
        counts = [str(counter[category['id']]) for counter in (objects, detections)]
        rows.append([category['name'], *counts, *(f'{n:.3f}' if n > -1 else '-' for n in numbers)])
    table = AsciiTable(rows)
    table.justify_columns = {column: 'right' for column in range(1, 6)}
    return table.table


def diagnose(ground_truth: dict[str, Any], records: list[dict[str, Any]], iou_type: str,
             scores: Scores) -> str | None:
    """Why AP is 0 or undefined, in words; None where it is neither."""
    if scores.stats[0] == -1:
        return f'{iou_type} AP is undefined (-1): no ground truth in the images tested, crowds aside'
    if scores.stats[0] > 0:
        return None
    objects = sum(not annotation['iscrowd'] for annotation in ground_truth['annotations'])
    facts = f'{iou_type} AP is 0: {objects} ground truths, {len(records)} detections'
    if not records:
        return f'{facts}. Likely cause: an untrained or diverged model, or a score_thr above all scores'
    matches = count_matches(ground_truth, records, iou_type)
    confidence = [record['score'] for record in records]
    facts += (f' with scores from {min(confidence):.3f} to {max(confidence):.3f}, {matches} ground truths '
              'matched at IoU >= 0.5 when the class is ignored')
    if matches >= 0.3 * objects:  # chance alone finds some
        return f'{facts}. Likely cause: class mix-up (another order of classes in checkpoint and data set)'
    return (f'{facts}. Likely cause: {iou_type} results off the objects (an untrained or diverged model, '
            'images of another data set, or boxes in another scale)')
