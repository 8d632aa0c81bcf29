"""The COCO numbers, by pycocotools run by hand."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


@pytest.fixture
def pycocotools_stats() -> Callable[[Path, Path, str], np.ndarray]:
    """``pycocotools_stats(ann_file, result_file, iou_type)``: the twelve numbers."""

    def stats(ann_file: Path, result_file: Path, iou_type: str) -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(ann_file))
            evaluator = COCOeval(truth, truth.loadRes(str(result_file)), iou_type)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return evaluator.stats

    return stats
