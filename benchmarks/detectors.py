"""The detectors that are compared, with the same weights, and the images they see."""

import argparse
import atexit
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import device, positive
from torch import Tensor, nn
from torchvision.ops import box_iou

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'gcnet'
PLAIN, CONTEXT = 'mask_rcnn_r50_fpn_1x.py', 'mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py'
IMAGES = dict(train=2, test=1)  # a step, if --batch says nothing
NUM_CLASSES = 80
OTHER = ('mmdetection', 'detectron2')  # mmdetection's package has the name of this project's


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """``--data``: real images."""
    parser.add_argument('--data', type=coco_folder, required=True,
                        help='folder with annotations/instances_{train,val}2017.json, train2017/, val2017/')


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """``--data``, ``--device`` and ``--amp``."""
    add_data_argument(parser)
    parser.add_argument('--device', type=device, default='cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast for all peers')


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the batch, and peers that live in environments of their own."""
    parser.add_argument('--batch', type=positive, help='images a step')
    for name in OTHER:
        parser.add_argument(
            f'--{name}', type=interpreter, metavar='PYTHON', help=f'Python of an environment with {name}')


def coco_folder(text: str) -> Path:
    """A flag's value: a folder with COCO's two annotation files."""
    for part in ('train', 'val'):
        file = Path(text) / 'annotations' / f'instances_{part}2017.json'
        if not file.is_file():
            raise argparse.ArgumentTypeError(f'{file} does not exist')
    return Path(text)


def interpreter(text: str) -> str:
    """A flag's value: a command that there is."""
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f'{text!r} is no command')
    return text


def autocast(args: argparse.Namespace, enabled: bool = False) -> torch.autocast:
    """bfloat16 autocast, if it is enabled here or for all peers."""
    return torch.autocast(args.device, torch.bfloat16, enabled=enabled or args.amp)


def random_weights(model: nn.Module, seed: int = 6) -> None:
    """Weights with which activations keep their size and 100 objects an image are found, trained or not.

    Those of a name are the same in each model, so that with context blocks, which add little, the same is
    found: masks of other shapes would take another time to encode.
    """
    gains = {'rpn_cls': 0.15, 'rpn_reg': 0.1, 'fc_cls': 1.0, 'fc_reg': 0.15, 'conv_logits': 1.0, 'neck': 1.0,
             'conv_mask': 1.0, 'channel_add_conv.3': 0.1}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        value = torch.randn(tensor.shape, generator=generator)
        if name.endswith('running_var'):
            value = (0.1 * value).exp()
        elif name.endswith(('bias', 'running_mean')):
            value *= 0.05
        elif tensor.dim() in (2, 4):
            fan_in = tensor.shape[0] if 'upsample' in name else tensor.shape[1:].numel()
            gain = next((g for part, g in gains.items() if part in name), 2**0.5)
            value *= gain / fan_in**0.5
        else:  # norms; a small one at the end keeps the sum of the residual branches small
            value = (1 + 0.05 * value) * (0.3 if 'bn3' in name else 1)
        tensor.copy_(value)


def build_detector(config: str, size: int) -> tuple[Any, Any]:
    """The config and its detector, whose RoIAlign is torchvision's: 2 x 2 samples, no half-pixel shift."""
    from mmdet.registry import MODELS
    from mmdet.utils.config import load_config

    cfg = load_config(CONFIGS / config, {'model.backbone.pretrained': None})
    for kind in ('bbox', 'mask'):
        extractor = cfg.model.roi_head[f'{kind}_roi_extractor']
        extractor.shift = 0.5
        extractor.roi_layer.sampling_ratio = 2
    for part in ('train', 'test'):
        for step in cfg[f'{part}_dataloader'].dataset.pipeline:
            if step['type'] == 'Resize':
                step['scale'] = (round(size * 1333 / 800), size)
    model = MODELS.build(cfg.model)
    random_weights(model)
    return cfg, model


def load_batch(cfg: Any, part: str, args: argparse.Namespace, size: int) -> dict[str, Any]:
    """The first images whose short side became ``size``, not limited by the long side."""
    from mmengine.dataset import pseudo_collate

    from mmdet.registry import DATASETS

    dataset = DATASETS.build(dict(cfg[f'{part}_dataloader'].dataset, data_root=str(args.data)))
    loaded = (dataset[i] for i in range(len(dataset)))
    fitting = (item for item in loaded if min(item['inputs'].shape[1:]) == size)
    count = args.batch or IMAGES[part]
    items = [item for item, _ in zip(fitting, range(count))]
    if not items:
        raise SystemExit(f'error: {args.data} has no image to {part} on with a short side of {size} pixels')
    items = [items[i % len(items)] for i in range(count)]  # a large batch of a small data set
    if args.device != 'cpu':  # as the data loader does
        items = [{key: value.pin_memory() for key, value in item.items()} for item in items]
    return pseudo_collate(items)


def other_commands(args: argparse.Namespace, case: str, part: str) -> dict[str, list[str]]:
    """The commands of the peers of other environments; a file tells them weights and images."""
    pythons = {name: getattr(args, name) for name in OTHER if getattr(args, name)}
    if not pythons:
        return {}
    from mmdet.structures.masks import masks_to_bitmaps

    cfg, model = build_detector(PLAIN, int(case))
    loaded = load_batch(cfg, part, args, int(case))
    samples = []
    for sample in loaded['data_samples']:
        samples.append({k: v for k, v in vars(sample).items() if v is not None})
        if sample.masks is not None:
            samples[-1]['masks'] = masks_to_bitmaps(sample.masks, sample.img_shape)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    file = Path(folder) / 'exchange.pt'
    torch.save(dict(state=model.state_dict(), inputs=loaded['inputs'], samples=samples), file)
    words = [part, str(file), str(args.threads), args.device, *(['--amp'] if args.amp else [])]
    return {name: [python, str(Path(__file__).with_name(f'peer_{name}.py')), *words]
            for name, python in pythons.items()}


def build_torchvision(model: nn.Module, size: int) -> Any:
    """torchvision's maskrcnn_resnet50_fpn with frozen batch norm and the weights of ``model``."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name='resnet50', weights=None, trainable_layers=3)
    peer = MaskRCNN(backbone, NUM_CLASSES + 1, min_size=size, max_size=10 * size)
    peer.load_state_dict(torchvision_state(model.state_dict()))
    generator: Any = model.rpn_head.anchor_generator  # torchvision rounds its anchors
    peer.rpn.anchor_generator.cell_anchors = [generator.base_anchors(s).float() for s in generator.strides]
    return peer


def torchvision_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of this project's Mask R-CNN R50-FPN under torchvision's names, with background first."""
    names = {
        'backbone.': 'backbone.body.', 'neck.lateral_convs': 'backbone.fpn.inner_blocks',
        'neck.fpn_convs': 'backbone.fpn.layer_blocks', 'rpn_head.rpn_conv': 'rpn.head.conv.0.0',
        'rpn_head.rpn_cls': 'rpn.head.cls_logits', 'rpn_head.rpn_reg': 'rpn.head.bbox_pred',
        'roi_head.bbox_head.shared_fcs.0': 'roi_heads.box_head.fc6',
        'roi_head.bbox_head.shared_fcs.1': 'roi_heads.box_head.fc7',
        'roi_head.bbox_head.fc_cls': 'roi_heads.box_predictor.cls_score',
        'roi_head.bbox_head.fc_reg': 'roi_heads.box_predictor.bbox_pred',
        'roi_head.mask_head.convs': 'roi_heads.mask_head',
        'roi_head.mask_head.upsample': 'roi_heads.mask_predictor.conv5_mask',
        'roi_head.mask_head.conv_logits': 'roi_heads.mask_predictor.mask_fcn_logits'}
    converted = {}
    for name, value in state.items():
        if name.endswith('num_batches_tracked'):
            continue
        if 'fc_cls' in name:
            value = value.roll(1, dims=0)
        elif 'fc_reg' in name or 'conv_logits' in name:
            rows = len(value) // NUM_CLASSES
            value = torch.cat([torch.zeros_like(value[:rows]), value])
        old, new = next((old, new) for old, new in names.items() if name.startswith(old))
        converted[new + name[len(old):].replace('.conv.', '.0.')] = value
    return converted


def torchvision_images(batch: dict[str, Any], device: str) -> list[Tensor]:
    """The loader's BGR images (3, H, W) as torchvision's models take them: RGB, 0 to 1."""
    return [image.to(device).flip(0).float() / 255 for image in batch['inputs']]


def agreement(
    found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]
) -> tuple[float, str]:
    """The share of expected detections that were found, and how many were at least of the same label."""
    same = near = total = 0
    for a, b in zip(found, expected):
        boxes = [torch.tensor(r['boxes']).reshape(-1, 4) for r in (a, b)]
        scores, labels = ([torch.tensor(r[key]) for r in (a, b)] for key in ('scores', 'labels'))
        same_label = labels[0][:, None] == labels[1]
        distance = (boxes[0][:, None] - boxes[1]).abs().amax(dim=2)
        equal = same_label & (distance < 0.5) & ((scores[0][:, None] - scores[1]).abs() < 1e-3)
        same += int(equal.any(dim=0).sum())
        near += int((same_label & (box_iou(*boxes) > 0.5)).any(dim=0).sum())
        total += len(labels[1])
    return same / max(total, 1), (
        f'of {total} detections {same} have the same label, box (0.5 pixel) and score (0.001), '
        f'{near} the same label and a box of IoU > 0.5')
