"""Evaluate the results that `tools/test.py --out r.pkl` saved, without running the model again.

    python tools/eval_results.py r.pkl --ann annotations/instances_val2017.json [--eval bbox segm]
"""

import argparse
import io
import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.checkpoint_files import NUMPY_NAMES
from mmdet.engine.launch import parse_args, run_tool
from mmdet.evaluation import CocoMetric
from mmdet.utils.coco_file import read_annotation_file

KEYS = {'img_id', 'boxes', 'scores', 'labels'}


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain types and NumPy arrays; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if not re.fullmatch(NUMPY_NAMES, f'{module}.{name}'):
            raise pickle.UnpicklingError(f'it holds {module}.{name}, which could run code')
        return super().find_class(module, name)


def load_results(path: str) -> list[dict[str, Any]]:
    """The list of prediction dicts in ``path``; ValueError or FileNotFoundError in one line otherwise."""
    try:
        results = _PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except FileNotFoundError:
        raise FileNotFoundError(f'results {path} do not exist') from None
    except Exception as error:  # unpickling raises whatever the damaged bytes lead to
        raise ValueError(f'results {path} cannot be read as a pickle file: {error!r:.100}') from None
    if not isinstance(results, list) or not all(isinstance(r, dict) and r.keys() >= KEYS for r in results):
        raise ValueError(f'results {path} are not a list of dicts with {", ".join(sorted(KEYS))}: '
                         'give a file that tools/test.py --out wrote')
    if not results:
        raise ValueError(f'results {path} hold no image')
    return results


def category_ids(ann_file: str, classes: list[str] | None) -> list[int]:
    """The category id of each label: that of each class named, or all of the file in its order.

    Raises:
        ValueError: a class is named twice, or is not the name of one category.
    """
    categories = read_annotation_file(ann_file)['categories']
    if not classes:
        return [category['id'] for category in categories]
    names = [category['name'] for category in categories]
    for name in classes:
        if classes.count(name) > 1:
            raise ValueError(f'--classes names {name!r} twice')
        if name not in names:
            raise ValueError(f'class {name!r} is not among the categories of {ann_file}: {", ".join(names)}')
        if names.count(name) > 1:
            raise ValueError(f'class {name!r} is the name of several categories of {ann_file}')
    return [categories[names.index(name)]['id'] for name in classes]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description='Evaluate the results that tools/test.py --out saved.')
    parser.add_argument('results', help='pickle file of tools/test.py --out')
    parser.add_argument('--ann', required=True, help='COCO annotation file of the data set tested')
    parser.add_argument('--eval', nargs='+', choices=['bbox', 'segm'],
                        help='default: bbox, and segm where the results have masks')
    parser.add_argument('--eval_backend', choices=['hotcoco', 'pycocotools'], default='hotcoco')
    parser.add_argument('--classes', nargs='+', metavar='NAME',
                        help='classes in the order of the labels; default: the categories of the file')
    parser.add_argument('--json_prefix', metavar='P', help='write P.bbox.json and P.segm.json')
    args = parse_args(parser, argv)

    results = load_results(args.results)
    metric = CocoMetric(
        metric=args.eval or (['bbox', 'segm'] if any('masks' in r for r in results) else ['bbox']),
        eval_backend=args.eval_backend, outfile_prefix=args.json_prefix)
    metric.dataset_meta = dict(ann_file=args.ann, cat_ids=category_ids(args.ann, args.classes))
    metric.process(None, results)
    print(json.dumps(metric.evaluate(len(results))))


if __name__ == '__main__':
    run_tool(main)
