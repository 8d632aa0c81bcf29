"""Count a detector's parameters and multiply-adds.

    python tools/analysis/get_flops.py CONFIG [CONFIG ...] [--shape 1280 800] [--rois 1000]

Several configs are compared with the first. Multiply-adds are of convolutions and matrix products, in
one image of the shape, with so many RoIs in the box heads and 100 in the mask heads.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from terminaltables import AsciiTable
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdet.apis.inference import build_detector
from mmdet.engine.launch import add_cfg_options, parse_args, run_tool
from mmdet.utils.config import load_config

PARTS = ('backbone', 'neck', 'rpn_head', 'roi_head')
MASK_ROIS = 100


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Of each part, and ``context``: of the context blocks, which the backbone's number includes."""
    counts = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in PARTS}
    counts['context'] = sum(p.numel() for name, p in model.named_parameters() if '.context_block.' in name)
    counts['all'] = sum(p.numel() for p in model.parameters())
    return counts


def flops_of_context_pool(x: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the 1x1 convolution to one channel and of the weighted sum, from the shape (N, C, H, W) of x.

    An average is computed, and counted, in the same way.
    """
    return 2 * 2 * math.prod(x)


def flops_of_context_transform(
    context: Sequence[int], first_weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of its two linear layers, which are as large as one another."""
    return 2 * 2 * context[0] * math.prod(first_weight)


def flops_of_deform_conv(
    x: Sequence[int], weight: Sequence[int], offset: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of the convolution itself, from the shapes of its weight and of the offsets (N, 2 * K * K, H, W)."""
    return 2 * math.prod(weight) * offset[0] * offset[2] * offset[3]


def count_multiply_adds(model: Any, width: int, height: int, rois: int) -> int:
    """In one forward pass, on tensors without memory."""
    counter = FlopCounterMode(display=False, custom_mapping={
        torch.ops.mmdet.context_pool: flops_of_context_pool,
        torch.ops.mmdet.context_transform: flops_of_context_transform,
        torch.ops.torchvision.deform_conv2d: flops_of_deform_conv})
    with torch.no_grad(), counter:
        features = model.extract_features(torch.empty(1, 3, height, width, device='meta'))
        model.rpn_head(features)
        extractor, head = model.roi_head.bbox_roi_extractor, model.roi_head.bbox_head
        for stage in head if isinstance(head, nn.ModuleList) else [head]:
            stage(torch.empty(rois, extractor.out_channels, *[extractor.output_size] * 2, device='meta'))
        extractor, head = model.roi_head.mask_roi_extractor, model.roi_head.mask_head
        for stage in head if isinstance(head, nn.ModuleList) else [head] if head is not None else []:
            stage(torch.empty(MASK_ROIS, extractor.out_channels, *[extractor.output_size] * 2, device='meta'))
    return counter.get_total_flops() // 2


def build(cfg: Config) -> nn.Module:
    """The config's model in eval mode, on tensors without memory."""
    with torch.device('meta'):
        return build_detector(cfg).eval()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument('--shape', nargs=2, type=int, default=(1280, 800), metavar=('WIDTH', 'HEIGHT'))
    parser.add_argument('--rois', type=int, default=1000)
    add_cfg_options(parser)
    args = parse_args(parser, argv)
    if min(args.shape) < 1 or args.rois < 0:
        raise ValueError(f'--shape {" ".join(map(str, args.shape))} --rois {args.rois}: '
                         'sides from 1, RoIs from 0')
    rows = [['config', 'parameters (M)', 'context blocks (M)', 'over the first (M)', 'multiply-adds (G)']]
    first = None
    for config in args.configs:
        model = build(load_config(config, args.cfg_options))
        parameters = count_parameters(model)
        multiply_adds = count_multiply_adds(model, *args.shape, args.rois)
        first = first or parameters['all']
        rows.append([config, f'{parameters["all"] / 1e6:.3f}', f'{parameters["context"] / 1e6:.3f}',
                     f'{(parameters["all"] - first) / 1e6:+.3f}', f'{multiply_adds / 1e9:.1f}'])
    print(AsciiTable(rows).table)


if __name__ == '__main__':
    run_tool(main)
