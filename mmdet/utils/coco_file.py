"""Reads annotation files in COCO's format (cocodataset.org/#format-data), for training and for evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_annotation_file(
    ann_file: str | Path, object_hook: Callable[[dict[str, Any]], Any] | None = None, annotated: bool = True
) -> dict[str, Any]:
    """The parsed file: a dict with ``images``, ``annotations`` and ``categories``.

    Args:
        object_hook: what to make of each JSON object, as in ``json.loads``.
        annotated: whether ``annotations`` have to be there; else they are an empty list where they are not.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is not JSON, or lacks a list of images, annotations or categories.
    """
    path = Path(ann_file)
    if not path.is_file():
        raise FileNotFoundError(
            f'no annotation file {path.absolute()}: configs name it by data_root and ann_file')
    try:
        content = json.loads(path.read_text('utf-8-sig'), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{ann_file} is not a JSON file: {error}') from None
    if isinstance(content, dict) and not annotated:
        content.setdefault('annotations', [])
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f'{ann_file} is not an annotation file in COCO\'s format: no list {key!r} in it')
    return content
