"""The COCO data set, its transforms and samplers; importing them fills the registries."""

from . import coco, samplers, transforms

__all__ = ['coco', 'samplers', 'transforms']
