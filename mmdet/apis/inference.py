"""Load a detector, run it on images, draw what it found."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel

from mmdet.checkpoint import load_file, load_weights
from mmdet.datasets.coco import CocoDataset
from mmdet.datasets.transforms import LoadImageFromFile
from mmdet.legacy_2019 import choose_numerics
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.utils.config import load_config
from mmdet.utils.env import to_device
from mmdet.visualization import draw_detections, write_image

Image = str | Path | np.ndarray


def init_detector(config: str | Path | Config, checkpoint: str | Path | None = None, device: str = 'cpu',
                  cfg_options: Mapping[str, Any] | None = None) -> BaseModel:
    """The detector of a config, in evaluation mode; with the numerics of 2019 for a checkpoint of 2019.

    Args:
        config: path of a config file, or what ``load_config`` made of one.
        checkpoint: weights to load; without, the detector keeps its random start.
        device: 'cpu', 'cuda:0', ...
        cfg_options: settings that override the file's: ``{'model.test_cfg.rcnn.score_thr': 0.3}``.

    Returns:
        The model, with ``cfg`` (the config) and ``dataset_meta`` (``classes``: those of the checkpoint,
        else of the config).

    Raises:
        FileNotFoundError, ValueError: see ``load_config``, ``load_file`` and ``load_weights``.
    """
    if isinstance(config, Config):
        cfg = config.copy()
        cfg.merge_from_dict(dict(cfg_options or {}))
    else:
        cfg = load_config(config, cfg_options)
    content = None if checkpoint is None else load_file(checkpoint)
    meta: dict[str, Any] = content['meta'] if content else {}
    cfg = choose_numerics(cfg, meta)
    given = {key: cfg[key] for key in ['data_preprocessor'] if key in cfg}  # as the runner hands it on
    model = MODELS.build(given | cfg.model)
    if content is None:
        warnings.warn('no checkpoint is given: the detector has random weights', stacklevel=2)
    else:
        load_weights(model, content['state_dict'], str(checkpoint))
    model.cfg = cfg
    metainfo = meta.get('dataset_meta') or cfg.test_dataloader.dataset.get('metainfo') or CocoDataset.METAINFO
    model.dataset_meta = dict(metainfo)
    return to_device(model, device).eval()


def inference_detector(model: BaseModel,
                       images: Image | Sequence[Image]) -> dict[str, Any] | list[dict[str, Any]]:
    """Detect objects in one image or in several, one after the other.

    Args:
        model: from ``init_detector``.
        images: path of an image file or (H, W, 3) uint8 array in BGR order, or a list of these.

    Returns:
        A dict for one image, a list of dicts for a list: ``boxes`` (n, 4) xyxy in pixels of the image,
        ``scores`` (n,), ``labels`` (n,), best first, and from a Mask R-CNN ``masks`` (n COCO RLE
        dicts); also ``img_id`` (position in the list), ``img_path`` and ``ori_shape``.

    Raises:
        FileNotFoundError: there is no such image.
        ValueError: an image cannot be decoded, or an array is not (H, W, 3) uint8.
    """
    if isinstance(images, (str, Path, np.ndarray)):
        return _detect(model, images, 0)
    return [_detect(model, image, i) for i, image in enumerate(images)]


def show_result(image: Image, result: Mapping[str, Any], classes: Sequence[str], score_thr: float = 0.3,
                out_file: str | Path | None = None) -> np.ndarray:
    """Draw the result of ``inference_detector`` on its image; see ``draw_detections``.

    Returns:
        The picture, uint8 BGR; written to ``out_file`` if that is given.
    """
    picture = draw_detections(_load(image)['img'], result, classes, score_thr)
    if out_file is not None:
        write_image(out_file, picture)
    return picture


def _detect(model: BaseModel, image: Image, img_id: int) -> dict[str, Any]:
    # The image is loaded here, since an array needs no loading.
    steps = model.cfg.test_dataloader.dataset.pipeline
    pipeline = Compose([TRANSFORMS.build(step) for step in steps if step['type'] != 'LoadImageFromFile'])
    item = pipeline(_load(image) | dict(img_id=img_id))
    with torch.no_grad():
        return model.test_step(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]))[0]


def _load(image: Image) -> dict[str, Any]:
    """What the transform LoadImageFromFile gives, also for an array."""
    if not isinstance(image, np.ndarray):
        return LoadImageFromFile().transform(dict(img_path=str(image)))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'an image must be (H, W, 3) uint8 in BGR order, not {image.shape} {image.dtype}')
    image = np.ascontiguousarray(image)
    return dict(img_path='', img=image, ori_shape=image.shape[:2], img_shape=image.shape[:2])
