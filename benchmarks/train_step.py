"""A training step of Mask R-CNN R50-FPN: forward, losses, backward, SGD, on a batch of loaded images.

    python benchmarks/train_step.py --data COCO --case 800 256

Each step is on the same batch. The samplers draw at random, so that losses agree but roughly.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from common import Peer, Step, common_parser, main
from detectors import (
    CONTEXT,
    PLAIN,
    add_peer_arguments,
    add_step_arguments,
    autocast,
    build_detector,
    build_torchvision,
    load_batch,
    other_commands,
    torchvision_images,
)
from torch import Tensor, nn


def plain(args: argparse.Namespace, config: str = PLAIN, amp: bool = False, compile: bool = False) -> Step:
    from mmdet.engine.runner import compile_backbone_and_neck
    from mmdet.utils.env import setup_cpu, to_device

    setup_cpu()
    cfg, model = build_detector(config, int(args.case))
    to_device(model, args.device)
    if compile:
        compile_backbone_and_neck(model)
    batch = load_batch(cfg, 'train', args, int(args.case))
    options = {key: value for key, value in cfg.optim_wrapper.optimizer.items() if key not in ('type', 'lr')}

    def losses() -> dict[str, Tensor]:
        with autocast(args, amp):
            found = model(**model.data_preprocessor(batch, training=True), mode='loss')
        return {name: loss for name, loss in found.items() if 'loss' in name}
    return training_step(model, losses, options)


def context(args: argparse.Namespace) -> Step:
    return plain(args, CONTEXT)


def bfloat16(args: argparse.Namespace) -> Step:
    return plain(args, PLAIN, amp=True)


def compiled(args: argparse.Namespace) -> Step:
    return plain(args, compile=True)


def torchvision(args: argparse.Namespace) -> Step:
    from mmdet.structures.masks import masks_to_bitmaps

    cfg, model = build_detector(PLAIN, int(args.case))
    peer = build_torchvision(model, int(args.case)).to(args.device)
    batch = load_batch(cfg, 'train', args, int(args.case))
    samples = [s.to(args.device) for s in batch['data_samples']]
    targets = [dict(boxes=s.boxes, labels=s.labels + 1, masks=masks_to_bitmaps(s.masks, s.img_shape))
               for s in samples]

    def losses() -> dict[str, Tensor]:
        with autocast(args):
            return peer(torchvision_images(batch, args.device), targets)
    return training_step(peer, losses, dict(momentum=0.9, weight_decay=1e-4))


def training_step(model: nn.Module, losses: Callable[[], dict[str, Tensor]], options: dict[str, Any]) -> Step:
    """Forward, backward and update; gives the losses. They barely change the weights, so steps are alike."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6, **options)

    def step() -> Any:
        found = losses()
        optimizer.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        return {name: loss.item() for name, loss in found.items()}
    return step


def agree(args: argparse.Namespace, results: dict[str, Any]) -> Iterable[str]:
    totals = {name: sum(losses.values()) for name, losses in results.items()}
    lines = [f'{name}: total loss {total:.3f}' for name, total in totals.items()]
    plain = [total for name, total in totals.items() if 'GC' not in name]
    if plain and max(plain) > 1.2 * min(plain):
        raise SystemExit(f'error: losses that differ by more than the samples drawn: {"; ".join(lines)}')
    return lines


PEERS: dict[str, Peer] = {
    'torchvision': torchvision, 'float32': plain, 'float32, GC r4': context, 'float32, compiled': compiled,
    'bfloat16': bfloat16}

if __name__ == '__main__':
    parser = common_parser(__doc__)
    add_step_arguments(parser)
    add_peer_arguments(parser)
    main(parser, PEERS, ['800', '256'], agree, partial(other_commands, part='train'))
