"""Metrics: COCO AP of boxes and masks."""

from .coco_metric import CocoMetric

__all__ = ['CocoMetric']
