"""mmdetection 3's Mask R-CNN R50-FPN with this project's weights and images, as a peer of the other scripts.

Started by them with the Python of an environment that has mmdetection (``--mmdetection``): its package has
the same name as this project's.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from common import Step, serve, serve_other
from loader import passing
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from train_step import training_step

CONFIG = '.mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'


def build(exchange: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The detector, whose RoIAlign is torchvision's (2 x 2 samples, no half-pixel shift), and its batch."""
    from mmdet.structures.mask import BitmapMasks

    import mmdet
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = Config.fromfile(Path(mmdet.__file__).parent / CONFIG)
    cfg.model.backbone.init_cfg = None
    for kind in ('bbox', 'mask'):
        cfg.model.roi_head[f'{kind}_roi_extractor'].roi_layer.update(sampling_ratio=2, aligned=False)
    model = MODELS.build(cfg.model)
    model.load_state_dict(exchange['state'])
    samples = []
    for found in exchange['samples']:
        keys = ('img_shape', 'ori_shape', 'scale_factor')
        sample = DetDataSample(metainfo={key: found[key] for key in keys})
        if 'masks' in found:
            masks = BitmapMasks(found['masks'].numpy(), *found['img_shape'])
            sample.gt_instances = InstanceData(bboxes=found['boxes'], labels=found['labels'], masks=masks)
        samples.append(sample)
    return model, dict(inputs=exchange['inputs'], data_samples=samples)


def inference(model: Any, batch: dict[str, Any], autocast: torch.autocast) -> Step:
    from mmdet.structures.mask import encode_mask_results

    model.eval()

    @torch.no_grad()
    def step() -> Any:
        with autocast:
            results = model.test_step(dict(batch))
        answer = []
        for result in results:
            found = result.pred_instances.cpu()
            encode_mask_results(found.masks.numpy())
            boxes = found.bboxes * torch.tensor(result.scale_factor).repeat(2)
            answer.append(dict(
                boxes=boxes.tolist(), scores=found.scores.tolist(), labels=found.labels.tolist()))
        return answer
    return step


def training(model: Any, batch: dict[str, Any], autocast: torch.autocast) -> Step:
    def losses() -> dict[str, torch.Tensor]:
        with autocast:
            found = model(**model.data_preprocessor(dict(batch), training=True), mode='loss')
        return {name: sum(loss) if isinstance(loss, list) else loss.sum()
                for name, loss in found.items() if 'loss' in name}
    return training_step(model, losses, dict(momentum=0.9, weight_decay=1e-4))


def loading(data: str, batch: str, workers: str) -> Step:
    import mmdet
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = Config.fromfile(Path(mmdet.__file__).parent / CONFIG).train_dataloader
    return passing(cfg, Runner.build_dataloader, f'{data}/', int(batch), int(workers))


if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]
    sys.path = [path for path in sys.path if Path(path).resolve() != root]
    if sys.argv[1] == 'loader':
        *words, threads = sys.argv[2:]
        serve(lambda: loading(*words), int(threads))
        sys.exit()
    serve_other(build, dict(test=inference, train=training))
