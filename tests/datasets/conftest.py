"""A small data set in COCO's format, written to a temporary folder."""
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

CATEGORIES = [dict(id=3, name='cat'), dict(id=7, name='dog'), dict(id=9, name='traffic light')]
CAT = dict(
    image_id=0, category_id=3, bbox=[2, 3, 10, 8], area=80, iscrowd=0,
    segmentation=[[2, 3, 12, 3, 12, 11, 2, 11]])


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes ``ann.json`` and PNG images; returns the arguments that CocoDataset needs for them.

    ``annotations``: what differs from a cat, 10 x 8 pixels at (2, 3) of image 0; ids count from 1.
    ``sizes``: (height, width) of the images, whose ids count from 0.
    """

    def make(annotations: Sequence[dict], sizes: Sequence[tuple] = ((40, 50),) * 3) -> dict[str, Any]:
        (tmp_path / 'img').mkdir()
        images = []
        for i, (height, width) in enumerate(sizes):
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / f'img/{i}.png'), pixels)
            images.append(dict(id=i, file_name=f'{i}.png', height=height, width=width))
        content = dict(
            images=images, categories=CATEGORIES,
            annotations=[dict(CAT, id=i) | changes for i, changes in enumerate(annotations, 1)])
        (tmp_path / 'ann.json').write_text(json.dumps(content))
        return dict(
            ann_file='ann.json', data_root=str(tmp_path), data_prefix=dict(img='img'),
            metainfo=dict(classes=('cat', 'dog', 'traffic light')))

    return make
