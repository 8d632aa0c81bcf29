"""Says in one line what is wrong with an annotation file in COCO's format.

CocoDataset calls, in this order: ``category_ids``, ``index_images`` once, then for
each annotation ``malformed``, ``unusable`` and ``check_segmentation``, at last ``check_files``.
"""

import difflib
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.structures.masks import segmentation_problem


def pack_polygons(record: dict[str, Any]) -> dict[str, Any]:
    """An annotation with its polygons as float64 arrays, which take a quarter of the memory of lists."""
    polygons = record.get('segmentation')
    if isinstance(polygons, list):
        try:
            record['segmentation'] = [array('d', polygon) for polygon in polygons]
        except (TypeError, OverflowError):
            pass  # check_segmentation names the annotation, where masks are needed
    return record


def category_ids(categories: list[dict], classes: Sequence[str], ann_file: str) -> list[int]:
    """The category id of each class.

    Raises:
        ValueError: a class is not in the file, or the file's categories are malformed.
    """
    for category in categories:
        named = isinstance(category, Mapping) and isinstance(category.get('name'), str)
        if not named or not isinstance(category.get('id'), int):
            raise ValueError(f'{ann_file}: a category needs a name and a whole number as id: {category}')
    ids = {category['name']: category['id'] for category in categories}
    if len(ids) < len(categories) or len(set(ids.values())) < len(categories):
        raise ValueError(f'{ann_file}: ids or names of categories are not unique')
    missing = [name for name in classes if name not in ids]
    if missing:
        nearest = ', '.join(
            f'{name!r} -> {match!r}'
            for name in missing[:3]
            for match in difflib.get_close_matches(name, list(ids), n=1, cutoff=0))
        raise ValueError(
            f'{ann_file} has no category {abbreviated(missing)}; nearest: {nearest or "none"}; '
            f'classes of the config: {abbreviated(classes)}; categories of the file: '
            f'{abbreviated(list(ids))}; set metainfo=dict(classes=...) of the data set to those of the file')
    return [ids[name] for name in classes]


def index_images(records: list[dict], folder: str, ann_file: str) -> dict[int, dict[str, Any]]:
    """Image id -> item without annotations, in the order of the file.

    Raises:
        ValueError: an image lacks a key, or its id is negative or not unique.
    """
    images: dict[int, dict[str, Any]] = {}
    for record in records:
        try:
            image_id, path = record['id'], os.path.join(folder, record['file_name'])
            height, width = record['height'], record['width']
            valid = isinstance(image_id, int) and image_id >= 0 and height > 0 and width > 0
        except (KeyError, TypeError):
            valid = False
        if not valid:
            raise ValueError(
                f'{ann_file}: an image needs an integer id from 0 on, file_name, height and width: '
                f'{str(record)[:200]}')
        if image_id in images:
            raise ValueError(f'{ann_file}: image id {image_id} is not unique')
        images[image_id] = dict(
            img_id=image_id, img_path=path, height=height, width=width, annotated=False, instances=[])
    return images


def malformed(annotation: Any, images: Mapping[int, Any], labels: Mapping[int, Any]) -> str:
    """What is malformed in an annotation; '' if nothing."""
    try:
        x, y, w, h = annotation['bbox']
        known_image, known_category = annotation['image_id'] in images, annotation['category_id'] in labels
        finite = math.isfinite(x + y + w + h + annotation.get('area', 0))
        name = f'annotation {annotation["id"]}'
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        shown = annotation
        if isinstance(annotation, Mapping):
            shown = {key: value for key, value in annotation.items() if key != 'segmentation'}
        return (
            'an annotation needs id, image_id, category_id, bbox (4 numbers) and, if any, a numeric area: '
            f'{str(shown)[:200]}')
    if not isinstance(annotation['id'], int):
        return f'an annotation id is not an integer: {annotation["id"]!r}'
    if not known_image:
        return f'{name} has an image_id that is not in the file: {annotation["image_id"]}'
    if not known_category:
        return f'{name} has a category_id that is not in the file: {annotation["category_id"]}'
    if not finite:
        return f'{name} has a bbox or area that is not finite: {annotation["bbox"]}, {annotation.get("area")}'
    if annotation.get('iscrowd') not in (0, 1, None):
        return f'{name} has an iscrowd that is neither 0 nor 1: {annotation["iscrowd"]!r}'
    return ''


def unusable(annotation: dict[str, Any], image: dict[str, Any]) -> str:
    """Why an annotation cannot be trained on; '' if it can."""
    x, y, w, h = annotation['bbox']
    if annotation.get('ignore'):
        return "marked 'ignore'"
    if annotation.get('area', w * h) <= 0 or w < 1 or h < 1:
        return 'of zero area or below 1 pixel'
    # Of less than a thousandth of a pixel nothing may be left in float32.
    inside = min(min(x + w, image['width']) - max(x, 0), min(y + h, image['height']) - max(y, 0))
    if inside < 1e-3:
        return 'outside the image'
    return ''


def check_segmentation(annotation: dict[str, Any], image: dict[str, Any], ann_file: str) -> None:
    """
    Raises:
        ValueError: no mask can be made of the annotation's segmentation.
    """
    problem = segmentation_problem(annotation.get('segmentation'), image['height'], image['width'])
    if problem:
        raise ValueError(f'{ann_file}: annotation {annotation["id"]} {problem}, but the pipeline has '
                         'LoadAnnotations with with_mask=True')


def check_files(paths: list[str], ann_file: str) -> None:
    """
    Raises:
        FileNotFoundError: an image of ``paths`` or its folder is missing.
    """
    # One listing per folder: a check of each file would take minutes on a network file system.
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            if not os.path.isdir(folder or '.'):
                raise FileNotFoundError(
                    f'no image folder {os.path.abspath(folder)}: set data_root and data_prefix.img')
            listings[folder] = set(os.listdir(folder or '.'))
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f'{len(missing)} of {len(paths)} images of {ann_file} do not exist, the first is {missing[0]}')


def abbreviated(names: Sequence[str]) -> str:
    """The first ten names, for a message."""
    shown = ', '.join(repr(name) for name in names[:10])
    return f'[{shown}, ... {len(names)} in all]' if len(names) > 10 else f'[{shown}]'
