"""Load a detector, run it on images, draw what it found."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
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
from mmdet.utils.config import check_config, load_config
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
        else of the config, else COCO's).

    Raises:
        FileNotFoundError, ValueError: see ``load_config``, ``load_file`` and ``load_weights``; a config that
            is given is checked as a file is.
    """
    if isinstance(config, Config):
        cfg = config.copy()
        cfg.merge_from_dict(dict(cfg_options or {}))
        # Of its own top-level keys some are helper variables, which nobody can tell from misspelt ones here.
        check_config(cfg, cfg.filename or 'config', helpers=config.keys())
    else:
        cfg = load_config(config, cfg_options)
    content = None if checkpoint is None else load_file(checkpoint)
    meta: dict[str, Any] = content['meta'] if content else {}
    cfg = choose_numerics(cfg, meta)
    model = build_detector(cfg)
    if content is None:
        warnings.warn('no checkpoint is given: the detector has random weights', stacklevel=2)
    else:
        load_weights(model, content['state_dict'], str(checkpoint))
    model.cfg = cfg
    sources = (cfg.test_dataloader.dataset.get('metainfo'), meta.get('dataset_meta'))
    model.dataset_meta = CocoDataset.METAINFO | {
        key: value for source in sources for key, value in (source or {}).items() if value}
    return to_device(model, device).eval()


def build_detector(cfg: Config) -> BaseModel:
    """The detector of a config, with random weights."""
    given = {key: cfg[key] for key in ['data_preprocessor'] if key in cfg}  # as the runner hands it on
    return MODELS.build(given | cfg.model)


def inference_detector(model: BaseModel,
                       images: Image | Iterable[Image]) -> dict[str, Any] | list[dict[str, Any]]:
    """Detect objects in one image or in several, one after the other.

    Args:
        model: from ``init_detector``.
        images: path of an image file or (H, W, 3) uint8 array in BGR order, or several of these.

    Returns:
        A dict for one image, a list of dicts for several: ``boxes`` (n, 4) xyxy in pixels of the image,
        ``scores`` (n,), ``labels`` (n,), best first, and from a Mask R-CNN ``masks`` (n COCO RLE
        dicts); also ``img_id`` (position in the list), ``img_path`` and ``ori_shape``.

    Raises:
        FileNotFoundError: there is no such image.
        ValueError: an image cannot be decoded, or is neither a path nor such an array.
    """
    if isinstance(images, Iterable) and not isinstance(images, (str, bytes, np.ndarray, torch.Tensor)):
        return [_detect(model, image, i) for i, image in enumerate(images)]
    return _detect(model, images, 0)


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


def _detect(model: BaseModel, image: Any, img_id: int) -> dict[str, Any]:
    # The image is loaded here, since an array needs no loading; it has no annotations.
    pipeline = Compose([TRANSFORMS.build(step) for step in model.cfg.test_dataloader.dataset.pipeline
                        if step['type'] not in ('LoadImageFromFile', 'LoadAnnotations')])
    item = pipeline(_load(image) | dict(img_id=img_id, rng=np.random.default_rng(img_id)))
    with torch.no_grad():
        return model.test_step(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]))[0]


def _load(image: Any) -> dict[str, Any]:
    """What the transform LoadImageFromFile gives, also for an array."""
    if isinstance(image, (str, Path)):
        return LoadImageFromFile().transform(dict(img_path=str(image)))
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        found = f'{image.shape} {image.dtype} array' if is_array else type(image).__name__
        raise ValueError(f'{found} is no image: give a path or an (H, W, 3) uint8 BGR array')
    image = np.ascontiguousarray(image)
    return dict(img_path='', img=image, ori_shape=image.shape[:2], img_shape=image.shape[:2])
