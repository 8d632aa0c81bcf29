"""Inference of Mask R-CNN R50-FPN: from loaded images to boxes and masks of the original size.

    python benchmarks/inference.py --data COCO --case 800 256

torchvision's masks are thresholded but not encoded; ours are COCO RLE.
"""

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from common import Peer, Step, common_parser, main
from detectors import (
    CONTEXT,
    OTHER,
    PLAIN,
    add_peer_arguments,
    add_step_arguments,
    agreement,
    autocast,
    build_detector,
    build_torchvision,
    load_batch,
    other_commands,
    torchvision_images,
)


def plain(
    args: argparse.Namespace, config: str = PLAIN, amp: bool = False, fold: bool = False
) -> Step:
    from mmdet.models.layers.norm import fold_batch_norms
    from mmdet.utils.env import setup_cpu, to_device

    setup_cpu()
    cfg, model = build_detector(config, int(args.case))
    to_device(model.eval(), args.device)
    if fold:
        fold_batch_norms(model)
    batch = load_batch(cfg, 'test', args, int(args.case))

    @torch.no_grad()
    def step() -> Any:
        with autocast(args, amp):
            results = model.test_step(batch)
        return [dict(boxes=(r['boxes'] * r['boxes'].new_tensor(s.scale_factor).repeat(2)).tolist(),
                     scores=r['scores'].tolist(), labels=r['labels'].tolist())
                for r, s in zip(results, batch['data_samples'])]
    return step


def context(args: argparse.Namespace) -> Step:
    return plain(args, CONTEXT)


def folded(args: argparse.Namespace) -> Step:
    return plain(args, fold=True)


def bfloat16(args: argparse.Namespace) -> Step:
    return plain(args, amp=True)


def torchvision(args: argparse.Namespace) -> Step:
    cfg, model = build_detector(PLAIN, int(args.case))
    peer = build_torchvision(model, int(args.case)).eval().to(args.device)
    batch = load_batch(cfg, 'test', args, int(args.case))

    @torch.no_grad()
    def step() -> Any:
        with autocast(args):
            results = peer(torchvision_images(batch, args.device))
        for result in results:
            result['masks'] = result['masks'] > 0.5
        return [dict(boxes=r['boxes'].tolist(), scores=r['scores'].tolist(),
                     labels=(r['labels'] - 1).tolist()) for r in results]
    return step


def agree(args: argparse.Namespace, results: dict[str, Any]) -> Iterable[str]:
    for name in ('torchvision', *OTHER, 'float32, folded', 'bfloat16'):
        if {name, 'float32'} <= results.keys():
            share, line = agreement(results['float32'], results[name])
            yield f'float32 and {name}: {line}'
            if share < 0.9 and name != 'bfloat16' and not args.amp:
                raise SystemExit(f'error: float32 and {name} find other objects: {line}')
    counts = {name: [len(image['labels']) for image in found] for name, found in results.items()}
    yield f'detections: {counts}'


PEERS: dict[str, Peer] = {
    'torchvision': torchvision, 'float32': plain, 'float32, folded': folded, 'float32, GC r4': context,
    'bfloat16': bfloat16}

if __name__ == '__main__':
    parser = common_parser(__doc__)
    add_step_arguments(parser)
    add_peer_arguments(parser)
    main(parser, PEERS, ['800', '256'], agree, partial(other_commands, part='test'))
