"""Pictures of the predictions."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.datasets.transforms import LoadImageFromFile
from mmdet.registry import HOOKS
from mmdet.structures.masks import finished
from mmdet.visualization import draw_detections, write_image


@HOOKS.register_module()
class DrawHook(Hook):
    """Draw on each image what testing finds.

    Args:
        out_dir: folder of the pictures; they have the names (and sub-folders) of their images, with ``.jpg``
            behind those that name no format that OpenCV writes.
        score_thr: objects with a lower score are left out.
    """

    def __init__(self, out_dir: str, score_thr: float = 0.3) -> None:
        self.out_dir = Path(out_dir)
        self.score_thr = score_thr

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                        outputs: Sequence[dict[str, Any]] | None = None) -> None:
        """Write one picture an image.

        Raises:
            ValueError: a picture cannot be written, or would take the place of its image.
        """
        dataset = runner.test_dataloader.dataset
        for prediction in map(finished, outputs or []):
            source = Path(prediction['img_path'])
            image = LoadImageFromFile().transform(dict(img_path=str(source)))['img']
            picture = draw_detections(image, prediction, dataset.metainfo['classes'], self.score_thr,
                                      dataset.metainfo['palette'])
            write_image(self._target(source, dataset), picture)

    def _target(self, source: Path, dataset: Any) -> Path:
        source = Path(os.path.normpath(source))
        folder = os.path.normpath(getattr(dataset, 'data_prefix', {}).get('img') or '.')
        target = self.out_dir / (source.relative_to(folder) if source.is_relative_to(folder) else source.name)
        if target.suffix.lower() in ('.pgm', '.pbm') or not cv2.haveImageWriter(str(target)):  # no colours
            target = target.with_name(f'{target.name}.jpg')
        if target.resolve() == source.resolve():
            raise ValueError(f'--show_dir {self.out_dir}: its picture would replace the image {target}: '
                             'give another folder')
        return target
