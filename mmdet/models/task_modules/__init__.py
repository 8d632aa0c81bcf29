"""Anchors, box coding, assignment and sampling."""

from mmdet.models.task_modules import anchor_generator, assigner, box_coder, sampler

__all__ = ['anchor_generator', 'assigner', 'box_coder', 'sampler']
