"""Compiled operators, on the CPU and on CUDA: RoIAlign, NMS, mask targets, mask pasting and
global context blocks. Deformable convolution on the CPU.

The kernels and their schemas are C++ (`csrc/`, the extension `mmdet._C`); Python adds to each op its
documentation, its shapes for tracing (fake kernel) and its gradient. Autocast casts nothing here: an op
runs in the dtype of its feature map, accumulates half precision in float32, and keeps RoIs and boxes in
float32.
"""
import importlib

import torch  # noqa: F401 - loads the libraries that mmdet._C needs

try:
    importlib.import_module('mmdet._C')  # registers the ops
except ImportError as error:
    raise ImportError(f'mmdet._C cannot be loaded ({error}): run ./compile.sh to build it') from None

# Modules with an underscore: `mmdet.ops.nms` is the function, whatever has been imported.
from ._context_block import context_fuse, context_pool
from ._context_transform import context_transform
from ._deform_conv import deform_conv2d
from ._nms import batched_nms, nms, soft_nms
from ._paste_masks import paste_masks
from ._roi_align import mask_targets, multilevel_roi_align, roi_align

__all__ = [
    'batched_nms', 'context_fuse', 'context_pool', 'context_transform', 'deform_conv2d',
    'mask_targets', 'multilevel_roi_align', 'nms', 'paste_masks', 'roi_align', 'soft_nms',
]
