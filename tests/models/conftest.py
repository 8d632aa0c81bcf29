"""A small model and images to run it on."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet.registry import MODELS
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import crop_masks
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / 'configs' / 'quickstart' / 'mask_rcnn_r4_gcb_c3-c5_r18_fpn_synthetic.py'
SMALLER = {
    'model.neck.out_channels': 16,
    'model.rpn_head.in_channels': 16,
    'model.rpn_head.feat_channels': 16,
    'model.roi_head.bbox_roi_extractor.out_channels': 16,
    'model.roi_head.bbox_head.in_channels': 16,
    'model.roi_head.bbox_head.fc_out_channels': 32,
    'model.roi_head.bbox_head.num_classes': 5,
    'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.mask_head.in_channels': 16,
    'model.roi_head.mask_head.conv_out_channels': 16,
    'model.roi_head.mask_head.num_classes': 5,
}


@pytest.fixture(scope='session')
def small_cfg() -> Config:
    """The quick start's config with few channels and 5 classes; copy it to change it."""
    return load_config(QUICKSTART, SMALLER)


@pytest.fixture
def build(small_cfg: Config) -> Callable[..., nn.Module]:
    """``build('roi_head.mask_head', None)``: the small model with keys of ``model`` changed."""
    def build_model(*changes: Any) -> nn.Module:
        cfg = small_cfg.copy()
        cfg.merge_from_dict({f'model.{key}': value for key, value in zip(changes[::2], changes[1::2])})
        return MODELS.build(cfg.model)
    return build_model


@pytest.fixture
def trained() -> Callable[[nn.Module], nn.Module]:
    """``trained(net)``: the net with other statistics, biases and context blocks than at the start."""
    def fill(net: nn.Module) -> nn.Module:
        for name, tensor in net.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(('running_mean', 'bias')) or 'channel_add_conv' in name:
                tensor.normal_(std=0.1)
        return net
    return fill


@pytest.fixture
def make_sample() -> Callable[..., DataSample]:
    """``make_sample(boxes, labels, crowd, shape)``: a sample whose masks fill the boxes."""
    def make(boxes: list[list[float]], labels: list[int] | None = None,
             crowd: list[list[float]] | None = None, shape: tuple[int, int] = (64, 96)) -> DataSample:
        masks = torch.zeros(len(boxes), *shape, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes):
            mask[int(y1):int(y2), int(x1):int(x2)] = 1
        return DataSample(
            img_id=7, img_path='image 7',
            ori_shape=shape, img_shape=shape, pad_shape=shape, batch_shape=shape,
            boxes=torch.tensor(boxes).reshape(-1, 4), masks=crop_masks(masks),
            labels=torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
            ignored_boxes=torch.tensor(crowd or []).reshape(-1, 4))
    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Any]]:
    """What the loader gives for samples: noise as images."""
    def make(*samples: DataSample) -> dict[str, Any]:
        images = [torch.randint(0, 256, (3, *s.img_shape), dtype=torch.uint8) for s in samples]
        return dict(inputs=images, data_samples=list(samples))
    return make
