"""Compare a model with recorded numbers: same weights and images, everything from features to gradients.

    python tools/compare_reference.py CONFIG REFERENCE.json [--dtype float64]

REFERENCE.json holds what mmdetection 3.3 computes; the weights come from `fill.py` and the images
from `inputs.npz`, which lie beside it. Its `edits` of losses and RoIAlign are applied to the config,
before --cfg-options. Or it holds what the 2019 code computes (compare_golden.py). Prints a table and
what the file does not record, and exits with 1 if anything differs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_golden import compare_golden, is_golden
from comparison import MASK_IOU_BOUND, Comparison, mask_iou, match, worst_of
from reference_file import Arrays, apply_edits, build_model, load_arrays, load_batch, read_json
from torch import Tensor, nn

from mmdet.engine.launch import add_cfg_options, parse_args, run_tool
from mmdet.models.layers.deform_conv import DeformConv2d
from mmdet.structures.boxes import Proposals, box_iou
from mmdet.utils.config import load_config

# (features and maps in standard deviations, losses relative, gradient norms relative, score)
BOUNDS = {torch.float32: (1e-5, 1e-5, 1e-3, 1e-4), torch.float64: (1e-9, 1e-9, 1e-9, 1e-9)}
# Batch statistics amplify rounding: mmdetection's own float32 gradients are up to 5e-3 off its float64 ones.
BATCH_STATISTICS_GRAD_BOUND = {torch.float32: 5e-3, torch.float64: 1e-9}
# Of a cascade on X101 with deformable convolutions they are 6.4e-3 off, and ours 8.2e-3: two float32 runs
# may differ by the sum.
DEFORMABLE_GRAD_BOUND = {torch.float32: 2e-2, torch.float64: 1e-9}
BOX_BOUND = {torch.float32: 1e-2, torch.float64: 1e-6}
EXCHANGED_BOUND = {torch.float32: 1e-2, torch.float64: 0}

def tensor_error(tensor: Tensor, recorded: dict[str, Any]) -> float:
    """Largest error of a tensor's recorded statistics and samples, in its standard deviations."""
    if list(tensor.shape) != recorded['shape']:
        raise ValueError(f'a tensor has the shape {list(tensor.shape)}, the reference {recorded["shape"]}: '
                         'is the reference of another config?')
    wide = tensor.detach().double()
    found = [wide.mean(), wide.std(correction=0), wide.abs().mean(), wide.min(), wide.max(),
             *wide.flatten()[recorded['idx']]]
    expected = [recorded['mean'], recorded['std'], recorded['abssum'] / tensor.numel(), recorded['min'],
                recorded['max'], *recorded['val']]
    return max(abs(float(a) - b) for a, b in zip(found, expected)) / max(recorded['std'], 1e-12)


def compare_inference(model: Any, batch: dict[str, Any], reference: dict[str, Any],
                      arrays: Arrays, out: Comparison) -> None:
    """Features, RPN maps, proposals, heads on fixed RoIs, and detections."""
    dtype = model.data_preprocessor.mean.dtype
    bound, _, _, score_bound = BOUNDS[dtype]
    model.eval()
    data = model.data_preprocessor(batch)
    samples = data['data_samples']
    if out.has(reference, 'input'):
        out.add('input', tensor_error(data['inputs'], reference['input']), bound)
    backbone = model.backbone(data['inputs'])
    features = model.neck(backbone)
    cls_maps, reg_maps = model.rpn_head(features)
    for name, levels in dict(backbone=backbone, neck=features, rpn_cls=cls_maps, rpn_reg=reg_maps).items():
        if out.has(reference, name):
            for i, (level, recorded) in enumerate(zip(levels, reference[name], strict=True)):
                out.add(f'{name}[{i}]', tensor_error(level, recorded), bound)

    proposals = model.rpn_head.predict(features, samples, model.test_proposal_cfg)
    threshold = model.test_proposal_cfg['nms']['iou_threshold']
    compare_proposals(proposals, threshold, reference, arrays, dtype, out)
    if out.has(reference, 'fixed_roi_heads') and out.has(arrays, 'fixed_rois'):
        compare_heads(model.roi_head, features, stages_of(reference['fixed_roi_heads']), arrays, bound, out)

    if not out.has(reference, 'detections'):
        return
    results = model.roi_head.predict(features, proposals, samples)
    for i, (result, recorded) in enumerate(zip(results, reference['detections'], strict=True)):
        out.add(f'detections of image {i}: number', abs(len(result['boxes']) - recorded['n']), 0)
        if recorded['n'] == 0 or len(result['boxes']) == 0 or not out.has(arrays, f'det_boxes_{i}'):
            continue
        index, box_error, score_error = match(
            result['boxes'], result['scores'], arrays[f'det_boxes_{i}'], arrays[f'det_scores_{i}'],
            result['labels'], arrays[f'det_labels_{i}'])
        out.add(f'detections of image {i}: boxes (pixels)', box_error.max(), BOX_BOUND[dtype])
        out.add(f'detections of image {i}: scores', score_error.max(), score_bound)
        if 'masks' in result and out.has(recorded, 'rle', f'masks of image {i}'):
            ious = [mask_iou(result['masks'][j], rle) for j, rle in zip(index, recorded['rle'], strict=True)]
            out.add(f'detections of image {i}: 1 - mask IoU', 1 - min(ious), 1 - MASK_IOU_BOUND)


def compare_proposals(proposals: list[Proposals], iou_threshold: float, reference: dict[str, Any],
                      arrays: Arrays, dtype: torch.dtype, out: Comparison) -> None:
    """Boxes, scores and number of each image's proposals."""
    for i, found in enumerate(proposals):
        what = f'proposals of image {i}'
        if out.has(reference, 'proposals', f'number of {what}'):
            out.add(f'{what}: number', abs(len(found.boxes) - reference['proposals'][i]), 0)
        if not out.has(arrays, f'prop_boxes_{i}', what):
            continue
        boxes, scores = arrays[f'prop_boxes_{i}'], arrays[f'prop_scores_{i}']
        _, box_error, score_error = match(found.boxes, found.scores, boxes, scores)
        rivals = exchanged(found, boxes, scores, iou_threshold) & (box_error > BOX_BOUND[dtype])
        out.add(f'{what}: boxes (pixels), but for {rivals.sum()} ties',
                box_error[~rivals].max(initial=0), BOX_BOUND[dtype])
        out.add(f'{what}: share of such ties', rivals.mean(), EXCHANGED_BOUND[dtype])
        out.add(f'{what}: scores', score_error.max(), BOUNDS[dtype][3])


def exchanged(found: Proposals, boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Which recorded boxes (n, 4) may have lost to a found one of exactly their score.

    Where the sigmoid saturates in float32, mmdetection ranks boxes that tie as they come, we by logit:
    another of two that overlap by more than ``iou_threshold`` then survives the NMS.
    """
    overlaps = box_iou(torch.from_numpy(boxes).double(), found.boxes.double())
    ties = torch.from_numpy(scores)[:, None] == found.scores[None]
    return ((overlaps > iou_threshold) & ties).any(dim=1).numpy()


def stages_of(recorded: Any) -> list[dict[str, Any]]:
    """The heads' outputs, a dict a stage: recorded as a list, as a dict of stages, or as a single stage."""
    if isinstance(recorded, list):
        return recorded
    return [recorded] if 'cls_score' in recorded else list(recorded.values())


def compare_heads(roi_head: Any, features: list[Tensor], recorded_stages: list[dict[str, Any]],
                  arrays: Arrays, bound: float, out: Comparison) -> None:
    """RoI features and the outputs of each stage's heads on the recorded RoIs."""
    rois = torch.from_numpy(arrays['fixed_rois']).to(features[0].dtype)
    def stages(module: nn.Module) -> list[Any]:
        return list(module) if isinstance(module, nn.ModuleList) else [module]

    bbox_heads = stages(roi_head.bbox_head)
    mask_heads = stages(roi_head.mask_head) if roi_head.mask_head is not None else [None] * len(bbox_heads)
    if len(bbox_heads) != len(recorded_stages):
        raise ValueError(f'the RoI head has {len(bbox_heads)} stages, that of the reference '
                         f'{len(recorded_stages)}: is the reference of another config?')
    for i, (bbox_head, mask_head, recorded) in enumerate(zip(bbox_heads, mask_heads, recorded_stages)):
        stage = f'stage {i}: ' if len(bbox_heads) > 1 else ''
        box_features = roi_head.bbox_roi_extractor(features, rois)
        logits, deltas = bbox_head(box_features)
        found = dict(bbox_roi_feats=box_features, cls_score=logits, bbox_pred=deltas)
        if mask_head is not None:
            found['mask_roi_feats'] = roi_head.mask_roi_extractor(features, rois)
            found['mask_logits'] = mask_head(found['mask_roi_feats'])
        for name, tensor in found.items():
            if out.has(recorded, name, f'{stage}{name} of fixed RoIs'):
                out.add(f'{stage}{name} of fixed RoIs', tensor_error(tensor, recorded[name]), bound)
        for name, tensor in ((f'fixed_cls_{i}', logits), (f'fixed_reg_{i}', deltas)):
            if out.has(arrays, name):
                expected = torch.from_numpy(arrays[name]).double()
                error = (tensor.double() - expected).abs().max() / expected.std()
                out.add(f'{stage}{name}, every value', error, bound)


def compare_training(model: Any, batch: dict[str, Any], reference: dict[str, Any], out: Comparison) -> None:
    """Losses, gradients, what is frozen, and the running statistics after one step."""
    dtype = model.data_preprocessor.mean.dtype
    _, loss_bound, _, _ = BOUNDS[dtype]
    model.train()
    data = model.data_preprocessor(batch, training=True)
    losses = model(**data, mode='loss')
    total = sum(loss for name, loss in losses.items() if 'loss' in name)
    if out.has(reference, 'losses'):
        if losses.keys() != reference['losses'].keys():
            raise ValueError(f'the losses are {list(losses)}, the reference has {list(reference["losses"])}: '
                             'is the reference of another config?')
        for name, recorded in reference['losses'].items():
            # mmdetection logs the RPN's losses a level each.
            expected = sum(recorded) if isinstance(recorded, list) else recorded
            out.add(name, abs(losses[name].item() - expected) / max(abs(expected), 1e-12), loss_bound)
    if out.has(reference, 'loss_total'):
        expected = reference['loss_total']
        out.add('total loss', abs(total.item() - expected) / expected, loss_bound)
    total.backward()
    compare_gradients(model, reference, out)
    compare_statistics(model, reference, out)


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether any batch norm of a model in training mode uses the batch's own statistics."""
    return any(m.training for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def compare_gradients(model: nn.Module, reference: dict[str, Any], out: Comparison) -> None:
    """Which parameters are frozen, and the norms of the others' gradients."""
    parameters = dict(model.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    bound = BOUNDS[dtype][2]
    if has_batch_statistics(model):
        deformable = any(isinstance(module, DeformConv2d) for module in model.modules())
        bound = (DEFORMABLE_GRAD_BOUND if deformable else BATCH_STATISTICS_GRAD_BOUND)[dtype]
    frozen = {name for name, p in parameters.items() if p.grad is None}
    if out.has(reference, 'no_grad'):
        out.add('names of frozen parameters', len(frozen ^ set(reference['no_grad'])), 0)
    if not out.has(reference, 'grads'):
        return
    out.add('names of trained parameters', len((parameters.keys() - frozen) ^ reference['grads'].keys()), 0)
    errors = {}
    for name, (_, expected_norm, *_) in reference['grads'].items():
        if name in frozen or name not in parameters:
            continue
        grad = parameters[name].grad
        assert grad is not None
        # The softmax over positions does not see a common bias: its gradient is exactly zero.
        scale = 1.0 if name.endswith('conv_mask.bias') else max(expected_norm, 1e-12)
        errors[name] = abs(float(grad.double().norm()) - expected_norm) / scale
    if errors:
        out.add(*worst_of('gradient norms', errors), bound)


def compare_statistics(model: nn.Module, reference: dict[str, Any], out: Comparison) -> None:
    """Running statistics after the step; only of a model that has batch statistics are they recorded."""
    recorded = reference.get('bn_after') or {}
    if not recorded:
        if has_batch_statistics(model):
            out.absent.append('bn_after')
        return
    buffers = dict(model.named_buffers())
    out.add('names of running statistics', len(recorded.keys() - buffers.keys()), 0)
    errors = {name: buffer_error(buffers[name], recorded[name]) for name in recorded.keys() & buffers.keys()}
    if errors:
        dtype = next(model.parameters()).dtype
        out.add(*worst_of('running statistics after the step', errors), BOUNDS[dtype][0])


def buffer_error(tensor: Tensor, recorded: Any) -> float:
    """Error of a buffer recorded as statistics, [sum, norm, first values], all values, or as weights are."""
    if isinstance(recorded, dict):
        return tensor_error(tensor, recorded)
    wide = tensor.double().flatten()
    if isinstance(recorded, list) and isinstance(recorded[0], list):
        shape, *recorded = recorded
        if list(tensor.shape) != shape:
            return float('inf')
        found = [wide.abs().sum(), wide[0]]
    elif not isinstance(recorded, list) or len(recorded) == tensor.numel():
        recorded = recorded if isinstance(recorded, list) else [recorded]
        found = list(wide)
    else:
        found = [wide.sum(), wide.norm(), *wide[:len(recorded) - 2]]
    scale = max(float(wide.norm()), 1e-12)
    return max(abs(float(a) - b) for a, b in zip(found, recorded, strict=True)) / scale


def compare_weights(model: Any, reference: dict[str, Any], out: Comparison) -> None:
    """Names, shapes and contents of the filled weights."""
    state = {name: tensor for name, tensor in model.state_dict().items()
             if not name.endswith('num_batches_tracked')}
    recorded = {name: value for name, value in reference['weights'].items()
                if not name.endswith('num_batches_tracked')}
    out.add('names of parameters', len(state.keys() ^ recorded.keys()), 0)
    errors = [0.0]
    for name in state.keys() & recorded.keys():
        shape, abssum, first = recorded[name]
        wide = state[name].double().flatten()
        errors += [float(list(state[name].shape) != shape), abs(float(wide.abs().sum()) - abssum) / abssum,
                   abs(float(wide[0]) - first)]
    out.add('filled weights', max(errors), 1e-6)


def compare(config: str, reference_path: Path, dtype: torch.dtype | None = None,
            cfg_options: dict[str, Any] | None = None) -> Comparison:
    """Everything, in the reference's dtype unless another is given."""
    reference = read_json(reference_path)
    if is_golden(reference):
        print(f'{config} against {reference["config"]} of 2019 in torch.float32')
        return compare_golden(load_config(config, cfg_options), reference_path, reference)
    arrays, inputs, fill = load_arrays(reference_path, reference)
    dtype = dtype or getattr(torch, reference['dtype'].removeprefix('torch.'))
    cfg = load_config(config, cfg_options)
    edits = apply_edits(cfg, reference)
    cfg.merge_from_dict(cfg_options or {})
    print(f'{config} against {reference.get("config", reference_path)} in {dtype}')
    print(f'its edits: {reference.get("edits") or "none"}; applied here: {", ".join(edits) or "none"}')
    model = build_model(cfg, fill, dtype)
    batch = load_batch(inputs)
    out = Comparison()
    compare_weights(model, reference, out)
    with torch.no_grad():
        compare_inference(model, batch, reference, arrays, out)
    compare_training(model, batch, reference, out)
    return out


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('reference', type=Path, help='JSON with what mmdetection 3.3 computes')
    parser.add_argument('--dtype', choices=['float32', 'float64'], help="default: the reference's")
    add_cfg_options(parser)
    args = parse_args(parser, argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    out = compare(args.config, args.reference, dtype, args.cfg_options)
    print(out.table())
    if out.absent:
        print(f'not recorded, so not compared: {", ".join(out.absent)}')
    if out.failed:
        print(f'{len(out.failed)} of {len(out.rows)} comparisons differ: {", ".join(out.failed)}')
        sys.exit(1)
    if not out.rows:
        raise ValueError(f'{args.reference} records nothing that could be compared')
    print(f'all {len(out.rows)} comparisons agree')


if __name__ == '__main__':
    # The recorded losses hold float32 logarithms, which MKL rounds according to the CPU unless it is told
    # otherwise before its first call.
    os.environ.setdefault('MKL_CBWR', 'COMPATIBLE')
    run_tool(main)
