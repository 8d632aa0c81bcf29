"""Compare a model in the 2019 mode with what the 2019 code computed for the same weights and images.

Called by compare_reference.py. Beside the file with the numbers lie `detweights.py`, which makes the
weights from their 2019 names, and `data/`, the images and annotations; the names and shapes are in
`../published_keys`.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import MASK_IOU_BOUND, Comparison, mask_iou, match, worst_of
from mmengine.config import Config
from torch import Tensor

from mmdet.checkpoint import convert_2019
from mmdet.datasets.coco import CocoDataset
from mmdet.legacy_2019 import legacy_2019
from mmdet.models.task_modules import sampler
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures.masks import masks_to_bitmaps

FEATURE_BOUND = 1e-4
BOX_BOUND = 1e-2
SCORE_BOUND = 1e-4
LOSS_BOUND = 5e-4
GRAD_BOUND = 5e-3
# Of ResNeXt-101 with DCN the 2019 code's own losses move by up to 5%, single gradients by more: rounding
# decides which boxes are sampled and where whole pixels begin. Of the gradients the typical one is compared.
NOISY_LOSS_BOUND = 0.1
NOISY_GRAD_BOUND = 0.2
LAST_PIXEL = np.array([0.0, 0.0, 1.0, 1.0], np.float32)


def is_golden(reference: dict[str, Any]) -> bool:
    """Whether a file of recorded numbers is one of the 2019 code's."""
    return 'train_inputs' in reference


def published_shapes(folder: Path, config: str) -> dict[str, list[int]]:
    """2019's names and shapes of a config; two with a 4conv1fc head were published as 4conv1f."""
    names = [f'{Path(config).stem}.json'.replace('4conv1f_', '4conv1fc_')]
    names.append(names[0].replace('4conv1fc_', '4conv1f_'))
    path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    return json.loads(path.read_text())


def golden_weights(path: Path, config: str) -> dict[str, Tensor]:
    """The weights under today's names."""
    spec = importlib.util.spec_from_file_location('detweights', path.parent / 'detweights.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = published_shapes(path.parents[1] / 'published_keys', config)
    return convert_2019({
        name: torch.from_numpy(np.asarray(module.det_tensor(name, shape))) for name, shape in shapes.items()})


def golden_model(cfg: Config, weights: dict[str, Tensor]) -> Any:
    """The detector of a config in the 2019 mode, on the CPU."""
    cfg.model.backbone.pretrained = None
    model = MODELS.build(cfg.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        what = ' '.join(str(error).split())[:200]
        raise ValueError(f'{what}...: is the reference of another config?') from error
    return model


def load_images(
    cfg: Config, path: Path, scale: list[int], indices: list[tuple[int, bool]], train: bool
) -> dict[str, Any]:
    """Images (index, flipped) of ``data/`` through the config's transforms, as a batch."""
    ann_file = path.parent / 'data/ann.json'
    classes = tuple(category['name'] for category in json.loads(ann_file.read_text())['categories'])
    dataset = CocoDataset(
        ann_file=str(ann_file), metainfo=dict(classes=classes),
        data_prefix=dict(img=str(path.parent / 'data/images')),
        test_mode=not train, filter_cfg=dict(filter_empty_gt=False))
    items = []
    for index, flip in indices:
        results = dict(dataset.get_data_info(index), rng=np.random.default_rng(0))
        pipeline = cfg.train_dataloader.dataset.pipeline if train else cfg.test_dataloader.dataset.pipeline
        for transform in pipeline:
            options = dict(transform)
            if options['type'] == 'Resize2019':
                options['scale'] = scale
            if options['type'] == 'RandomFlip':
                options['prob'] = float(flip)
            results = TRANSFORMS.build(options)(results)
        items.append(results)
    return {key: [item[key] for item in items] for key in ('inputs', 'data_samples')}


def tensor_error(tensor: Tensor, recorded: dict[str, Any]) -> float:
    """Largest error of a tensor's recorded statistics and first values, in standard deviations."""
    if list(tensor.shape) != recorded['shape']:
        raise ValueError(f'a tensor has the shape {list(tensor.shape)}, the reference {recorded["shape"]}: '
                         'is the reference of another config?')
    wide = tensor.detach().double()
    found = [wide.mean(), wide.std(), wide.abs().max(), *wide.flatten()[:len(recorded['head'])]]
    expected = [recorded['mean'], recorded['std'], recorded['absmax'], *recorded['head']]
    return max(abs(float(a) - b) for a, b in zip(found, expected)) / recorded['std']


def compare_image(
    model: Any, batch: dict[str, Any], recorded: dict[str, Any], name: str, out: Comparison
) -> None:
    """Features, proposals and detections of one image."""
    data = model.data_preprocessor(batch)
    out.add(f'{name}: input', tensor_error(data['inputs'], recorded['img']), FEATURE_BOUND)
    backbone = model.backbone(data['inputs'])
    features = model.neck(backbone)
    for part, levels in (('backbone', backbone), ('neck', features)):
        for i, (level, expected) in enumerate(zip(levels, recorded[part], strict=True)):
            out.add(f'{name}: {part}[{i}]', tensor_error(level, expected), FEATURE_BOUND)
    proposals = model.rpn_head.predict(features, data['data_samples'], model.test_proposal_cfg)
    out.add(f'{name}: number of proposals', abs(len(proposals[0].boxes) - recorded['num_proposals']), 0)
    expected = np.array(recorded['proposals_first20'], np.float32)
    _, box_error, score_error = match(
        proposals[0].boxes, proposals[0].scores, expected[:, :4] + LAST_PIXEL, expected[:, 4])
    out.add(f'{name}: proposals (pixels)', box_error.max(), BOX_BOUND)
    out.add(f'{name}: scores of proposals', score_error.max(), SCORE_BOUND)

    [result] = model.roi_head.predict(features, proposals, data['data_samples'])
    expected_labels = [int(label) for label, boxes in recorded['dets'].items() for _ in boxes]
    out.add(f'{name}: number of detections', abs(len(result['boxes']) - len(expected_labels)), 0)
    if not expected_labels or not len(result['boxes']):
        return
    expected = np.array([box for boxes in recorded['dets'].values() for box in boxes], np.float32)
    index, box_error, score_error = match(
        result['boxes'], result['scores'], expected[:, :4] + LAST_PIXEL, expected[:, 4],
        result['labels'], np.array(expected_labels))
    out.add(f'{name}: detections (pixels)', box_error.max(), BOX_BOUND)
    out.add(f'{name}: scores of detections', score_error.max(), SCORE_BOUND)
    rles = [rle for masks in recorded['segms'].values() for rle in masks]
    ious = [mask_iou(result['masks'][j], rle['counts']) for j, rle in zip(index, rles, strict=True)]
    out.add(f'{name}: 1 - mask IoU', 1 - min(ious), 1 - MASK_IOU_BOUND)


def compare_training(
    model: Any, batch: dict[str, Any], reference: dict[str, Any], noisy: bool, out: Comparison
) -> None:
    """Annotations as loaded, losses and gradients of one step; losses loosely if they are ``noisy``."""
    inputs = reference['train_inputs']
    model.train()
    data = model.data_preprocessor(batch, training=True)
    out.add('training: input', tensor_error(data['inputs'], inputs['img']), FEATURE_BOUND)
    for sample, boxes, labels, crowd, masks in zip(
            data['data_samples'], inputs['gt_bboxes'], inputs['gt_labels'], inputs['gt_bboxes_ignore'],
            inputs['gt_masks'], strict=True):
        for found, expected in ((sample.boxes, boxes), (sample.ignored_boxes, crowd)):
            error = found.numpy() - LAST_PIXEL - np.array(expected, np.float32).reshape(-1, 4)
            out.add('training: boxes (pixels)', np.abs(error).max(initial=0), BOX_BOUND)
        out.add('training: labels', np.abs(sample.labels.numpy() + 1 - np.array(labels)).max(initial=0), 0)
        sums = masks_to_bitmaps(sample.masks, sample.img_shape).sum(dim=(1, 2)).numpy()
        sums -= np.array(masks['sums'][:len(sums)])
        out.add('training: areas of masks', np.abs(sums).max(initial=0), 0)

    losses = model(**data, mode='loss')
    if losses.keys() != reference['losses'].keys():
        raise ValueError(f'the losses are {list(losses)}, the reference has {list(reference["losses"])}: '
                         'is the reference of another config?')
    for name, recorded in reference['losses'].items():
        expected = np.sum(recorded)
        # An accuracy is a share of few boxes, often of none, in percent.
        scale = 100.0 if name.endswith('acc') else max(abs(expected), 1e-12)
        out.add(name, abs(losses[name].item() - expected) / scale,
                NOISY_LOSS_BOUND if noisy else LOSS_BOUND)
    sum(loss for name, loss in losses.items() if 'loss' in name).backward()
    compare_gradients(model, reference, noisy, out)


def compare_gradients(model: Any, reference: dict[str, Any], noisy: bool, out: Comparison) -> None:
    """Which parameters are frozen, and the norms of the recorded gradients."""
    names_2019 = {name.removeprefix('roi_head.').replace('conv2.conv_offset', 'conv2_offset'): p
                  for name, p in model.named_parameters() if p.grad is not None}
    frozen = sum(p.grad is None for p in model.parameters())
    out.add('number of frozen parameters', abs(frozen - reference['no_grad_params']), 0)
    if not out.has(reference, 'grads'):
        return
    out.add('recorded gradients that are missing', len(reference['grads'].keys() - names_2019.keys()), 0)
    total = reference['grad_total_norm']
    errors = {name: abs(float(names_2019[name].grad.norm()) - norm) / max(norm, 1e-3 * total)
              for name, norm in reference['grads'].items() if name in names_2019}
    if noisy:
        out.add('gradient norms (median)', float(np.median(list(errors.values()))), NOISY_GRAD_BOUND)
        return
    out.add(*worst_of('gradient norms', errors), GRAD_BOUND)


def compare_golden(cfg: Config, path: Path, reference: dict[str, Any]) -> Comparison:
    """Everything that the file records."""
    cfg = legacy_2019(cfg)
    out = Comparison()
    weights = golden_weights(path, reference['config'])
    model = golden_model(cfg, weights)
    scale = reference['img_scale']
    model.eval()
    with torch.no_grad():
        for i, recorded in enumerate(reference['test']):
            batch = load_images(cfg, path, scale, [(i, recorded['meta']['flip'])], train=False)
            compare_image(model, batch, recorded, f'image {i}', out)
    flips = [meta['flip'] for meta in reference['train_inputs']['metas']]
    batch = load_images(cfg, path, scale, list(enumerate(flips)), train=True)
    # The 2019 code took the first of its candidates when the numbers were recorded, not random ones.
    random_choice = sampler.random_choice
    sampler.random_choice = lambda count, num: torch.arange(min(count, num))
    try:
        compare_training(model, batch, reference, cfg.model.backbone.type == 'ResNeXt', out)
    finally:
        sampler.random_choice = random_choice
    return out
