"""What the comparisons with recorded numbers share: the table of errors, and matching of detections."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from terminaltables import AsciiTable
from torch import Tensor

MASK_IOU_BOUND = 0.99


class Comparison:
    """Rows of (what, largest error, bound), and what could not be compared because it is not recorded."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []
        self.absent: list[str] = []

    def add(self, what: str, error: float, bound: float) -> None:
        self.rows.append((what, float(error), bound))

    def has(self, recorded: Mapping[str, Any], key: str, what: str = '') -> bool:
        """Whether ``recorded`` holds anything under ``key``; what is not there is noted."""
        value = recorded.get(key)
        found = value is not None and not (isinstance(value, Sized) and len(value) == 0)
        if not found:
            self.absent.append(what or key)
        return found

    @property
    def failed(self) -> list[str]:
        # 'not <=' so that a NaN fails.
        return [what for what, error, bound in self.rows if not error <= bound]

    def table(self) -> str:
        failed = set(self.failed)
        rows = [[what, f'{error:.2e}', f'{bound:.0e}', 'DIFFERS' if what in failed else 'ok']
                for what, error, bound in self.rows]
        return AsciiTable([['what', 'largest error', 'bound', ''], *rows]).table


def worst_of(what: str, errors: dict[str, float]) -> tuple[str, float]:
    """The largest error, and ``what`` with its name."""
    # A NaN is the worst, which max() alone would miss.
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return f'{what} (worst: {worst})', errors[worst]


def match(
    boxes: Tensor, scores: Tensor, ref_boxes: np.ndarray, ref_scores: np.ndarray,
    groups: Tensor | None = None, ref_groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each recorded box the nearest found one of its group: index, box error in pixels, score error."""
    distance = np.abs(boxes.double().numpy()[None] - ref_boxes[:, None]).max(axis=2)
    if groups is not None and ref_groups is not None:
        distance[ref_groups[:, None] != groups.numpy()[None]] = np.inf
    score_distance = np.abs(scores.double().numpy()[None] - ref_scores[:, None])
    index = (distance + score_distance).argmin(axis=1)
    rows = np.arange(len(index))
    return index, distance[rows, index], score_distance[rows, index]


def mask_iou(found: dict[str, Any], counts: str) -> float:
    """IoU of two RLE masks; 1 where at most one pixel differs.

    A pixel whose probability is the threshold up to rounding may fall either way, and one pixel is
    more than a hundredth of a small mask.
    """
    expected = dict(size=found['size'], counts=counts.encode())
    intersection = float(coco_mask.area(coco_mask.merge([expected, found], intersect=True)))
    union = float(coco_mask.area(coco_mask.merge([expected, found])))
    return 1.0 if union - intersection <= 1 else intersection / union
