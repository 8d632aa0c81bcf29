"""Reads what mmdetection 3.3 computed, and builds what it was computed with: model, weights and batch.

Called by compare_reference.py. The weights come from `fill.py` and the images from `inputs.npz`, which
lie beside the JSON file, as do the arrays that it names.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from mmdet.registry import MODELS
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import crop_masks

SAMPLES_OF_EVERYTHING = 1_000_000
# The losses and the RoIAlign of the GCNet repository, where mmdetection 3 has L1 and adaptive sampling.
RPN_SMOOTH_L1 = dict(type='SmoothL1Loss', beta=1 / 9)
BOX_SMOOTH_L1 = dict(type='SmoothL1Loss', beta=1.0)

Arrays = dict[str, np.ndarray]


def read_json(path: Path) -> dict[str, Any]:
    """What a reference file holds."""
    try:
        recorded = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path}: not a JSON file: {error}') from error
    if not isinstance(recorded, dict):
        raise ValueError(f'{path}: not a reference file; it holds a {type(recorded).__name__}')
    return recorded


def load_arrays(path: Path, reference: dict[str, Any]) -> tuple[Arrays, Arrays, Callable]:
    """The arrays that belong to a reference, the input images, and the function that fills weights."""
    if 'arrays' not in reference or 'weights' not in reference:
        raise ValueError(f'{path}: not a reference file; it has no "arrays" and "weights"')
    spec = importlib.util.spec_from_file_location('fill', path.parent / 'fill.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arrays = dict(np.load(path.parent / reference['arrays']))
    return arrays, dict(np.load(path.parent / 'inputs.npz')), module.fill


def apply_edits(cfg: Config, reference: dict[str, Any]) -> list[str]:
    """Change the losses and RoIAlign of ``cfg`` as the reference's ``edits`` say; returns what was changed.

    An edit is text, or a key with its value. One that names a single head or extractor changes that
    alone. A model called ``legacy`` has all of them.
    """
    edits = reference.get('edits') or []
    if isinstance(edits, str):
        edits = re.split(r'[;\n]', edits)
    elif isinstance(edits, dict):
        edits = list(edits.items())
    if 'legacy' in str(reference.get('model', '')):
        edits = [*edits, 'SmoothL1, sampling_ratio=2']
    roi_head = cfg.model.roi_head
    extractors = [name for name in ('bbox_roi_extractor', 'mask_roi_extractor') if roi_head.get(name)]
    changed = set()
    for edit in (json.dumps(edit).lower() for edit in edits):
        if re.search(r'smooth.?l1', edit):
            names_box = re.search(r'bbox_head|box.head|roi_head|rcnn', edit)
            if 'rpn' in edit or not names_box:
                cfg.model.rpn_head.loss_bbox = dict(RPN_SMOOTH_L1)
                changed.add('SmoothL1 in rpn_head')
            if names_box or 'rpn' not in edit:
                heads = roi_head.bbox_head
                for head in heads if isinstance(heads, list) else [heads]:
                    head.loss_bbox = dict(BOX_SMOOTH_L1)
                changed.add('SmoothL1 in bbox_head')
        if re.search(r'sampl\w*(\W*ratio)?\W{0,8}2\b', edit):
            for name in [name for name in extractors if name in edit] or extractors:
                roi_head[name].roi_layer.sampling_ratio = 2
                changed.add(f'sampling_ratio=2 in {name}')
    return sorted(changed)


def build_model(cfg: Config, fill: Callable, dtype: torch.dtype) -> Any:
    """The config's detector with filled weights, and with samplers that keep every box."""
    cfg.model.backbone.pretrained = None
    rcnn = cfg.model.train_cfg.rcnn
    for stage in [cfg.model.train_cfg.rpn, *(rcnn if isinstance(rcnn, list) else [rcnn])]:
        stage.sampler.num = SAMPLES_OF_EVERYTHING
    cfg.model.train_cfg.rpn_proposal.update(nms_pre=500, max_per_img=300)
    model = MODELS.build(cfg.model).to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            value = fill(name, tensor.shape)
            if value is not None:
                tensor.copy_(torch.from_numpy(np.asarray(value)))
    return model


def load_batch(inputs: Arrays) -> dict[str, Any]:
    """The images and annotations of inputs.npz as the loader would give them."""
    images, samples = [], []
    for i in range(sum(name.startswith('img_') for name in inputs)):
        image = inputs[f'img_{i}']
        shape = inputs[f'masks_shape_{i}']
        masks = np.unpackbits(inputs[f'masks_packed_{i}'])[:shape.prod()].reshape(shape)
        images.append(torch.from_numpy(image).permute(2, 0, 1))
        samples.append(DataSample(
            img_id=int(inputs[f'id_{i}']),
            img_path=f'image {i}',
            ori_shape=tuple(inputs[f'ori_shape_{i}'].tolist()),
            img_shape=image.shape[:2],
            scale_factor=tuple(inputs[f'scale_wh_{i}'].tolist()),
            boxes=torch.from_numpy(inputs[f'boxes_{i}']),
            labels=torch.from_numpy(inputs[f'labels_{i}']),
            masks=crop_masks(torch.from_numpy(masks))))
    return dict(inputs=images, data_samples=samples)
