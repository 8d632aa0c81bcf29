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
            behind those that name no format that OpenCV writes. Of images outside the data set's folder
            the path from there counts, without ``..``.
        score_thr: objects with a lower score are left out.
    """

    def __init__(self, out_dir: str, score_thr: float = 0.3) -> None:
        self.out_dir = Path(out_dir)
        self.score_thr = score_thr

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                        outputs: Sequence[dict[str, Any]] | None = None) -> None:
        """Write one picture an image; one that cannot be written is logged.

        Raises:
            ValueError: a picture would take the place of its image.
        """
        dataset = runner.test_dataloader.dataset
        for prediction in map(finished, outputs or []):
            source = Path(prediction['img_path'])
            image = LoadImageFromFile().transform(dict(img_path=str(source)))['img']
            picture = draw_detections(image, prediction, dataset.metainfo['classes'], self.score_thr,
                                      dataset.metainfo['palette'])
            target = self._target(source, dataset)
            try:
                write_image(target, picture)
            except (OSError, ValueError) as error:  # the evaluation needs no pictures
                runner.logger.warning(f'the picture of {source} was not written: {error}')

    def _target(self, source: Path, dataset: Any) -> Path:
        path = Path(os.path.relpath(source, getattr(dataset, 'data_prefix', {}).get('img') or '.'))
        target = self.out_dir.joinpath(*(part for part in path.parts if part != '..'))
        if target.suffix.lower() in ('.pgm', '.pbm') or not cv2.haveImageWriter(str(target)):  # no colours
            target = target.with_name(f'{target.name}.jpg')
        if target.resolve() == source.resolve():
            raise ValueError(f'--show_dir {self.out_dir}: its picture would replace the image {target}: '
                             'give another folder')
        return target
