"""Pictures of the predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        out_dir: folder of the pictures; they have the names (and sub-folders) of their images.
        score_thr: objects with a lower score are left out.
    """

    def __init__(self, out_dir: str, score_thr: float = 0.3) -> None:
        self.out_dir = Path(out_dir)
        self.score_thr = score_thr

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                        outputs: Sequence[dict[str, Any]] | None = None) -> None:
        """Write one picture an image.

        Raises:
            ValueError: a picture cannot be written.
        """
        dataset = runner.test_dataloader.dataset
        for prediction in map(finished, outputs or []):
            source = Path(prediction['img_path'])
            image = LoadImageFromFile().transform(dict(img_path=str(source)))['img']
            picture = draw_detections(image, prediction, dataset.metainfo['classes'], self.score_thr,
                                      dataset.metainfo['palette'])
            inside = source.is_relative_to(folder := dataset.data_prefix['img'])
            write_image(self.out_dir / (source.relative_to(folder) if inside else source.name), picture)
