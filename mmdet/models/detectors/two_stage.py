"""Two-stage detectors: Faster, Mask and Cascade R-CNN.

What happens to a batch of images: ``data_preprocessor`` -> ``backbone`` -> ``neck`` -> ``rpn_head``
(proposals) -> ``roi_head`` (boxes, classes, masks). ``N`` images.
"""

from itertools import product
from typing import Any

from mmengine.model import BaseModel
from torch import Tensor

from mmdet.checkpoint import load_pretrained_backbone
from mmdet.models.train_test_cfg import TestConfig, TrainConfig
from mmdet.registry import MODELS
from mmdet.structures.data_sample import DataSample

# Where a part of this type stands, what it takes, what gives that, and how many times that it is.
_FITS = (
    ('RPNHead', 'rpn_head', 'rpn_head.in_channels', 'neck.out_channels', 1),
    ('SingleRoIExtractor', 'roi_head.bbox_roi_extractor',
     'roi_head.bbox_roi_extractor.out_channels', 'neck.out_channels', 1),
    ('SingleRoIExtractor', 'roi_head.mask_roi_extractor',
     'roi_head.mask_roi_extractor.out_channels', 'neck.out_channels', 1),
    ('ConvFCBBoxHead', 'roi_head.bbox_head',
     'roi_head.bbox_head.in_channels', 'roi_head.bbox_roi_extractor.out_channels', 1),
    ('ConvFCBBoxHead', 'roi_head.bbox_head',
     'roi_head.bbox_head.roi_feat_size', 'roi_head.bbox_roi_extractor.roi_layer.output_size', 1),
    ('FCNMaskHead', 'roi_head.mask_head',
     'roi_head.mask_head.in_channels', 'roi_head.mask_roi_extractor.out_channels', 1),
    ('FCNMaskHead', 'roi_head.mask_head',
     'train_cfg.rcnn.mask_size', 'roi_head.mask_roi_extractor.roi_layer.output_size', 2),
)


@MODELS.register_module(name=['FasterRCNN', 'MaskRCNN', 'CascadeRCNN'])
class TwoStageDetector(BaseModel):
    """Faster R-CNN (arXiv 1506.01497); Mask R-CNN (arXiv 1703.06870) if the RoI head has a mask head;
    Cascade R-CNN (arXiv 1712.00726) if it is a CascadeRoIHead.

    Args:
        data_preprocessor, backbone, neck, rpn_head, roi_head: configs of the parts.
        train_cfg, test_cfg: assignment, sampling and post-processing of both stages.
    """

    def __init__(
        self,
        data_preprocessor: dict[str, Any],
        backbone: dict[str, Any],
        neck: dict[str, Any],
        rpn_head: dict[str, Any],
        roi_head: dict[str, Any],
        train_cfg: TrainConfig,
        test_cfg: TestConfig,
    ) -> None:
        super().__init__(data_preprocessor=MODELS.build(data_preprocessor))
        _check_fit(dict(neck=neck, rpn_head=rpn_head, roi_head=roi_head, train_cfg=train_cfg))
        self.backbone = MODELS.build(backbone)
        self.neck = MODELS.build(neck)
        self.rpn_head = MODELS.build(dict(rpn_head, train_cfg=train_cfg['rpn']))
        self.roi_head = MODELS.build(dict(roi_head, train_cfg=train_cfg['rcnn'], test_cfg=test_cfg['rcnn']))
        self.train_proposal_cfg = train_cfg['rpn_proposal']
        self.test_proposal_cfg = test_cfg['rpn']

    def init_weights(self) -> None:
        """Load the backbone's ``pretrained`` weights; everything else of ours was set when it was built.

        Parts of other kinds start as their own ``init_weights`` says.
        """
        if isinstance(getattr(self.backbone, 'pretrained', None), str) and not hasattr(
                self.backbone, 'init_weights'):
            load_pretrained_backbone(self.backbone, self.backbone.pretrained)
        for part in self.children():
            _start(part)

    def extract_features(self, inputs: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) to the pyramid's levels (N, C, H / stride_i, W / stride_i)."""
        return self.neck(self.backbone(inputs))

    def forward(
        self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = 'tensor'
    ) -> Any:
        """Run the detector on preprocessed images.

        Args:
            inputs: (N, 3, H, W), normalised and padded.
            data_samples: one an image; only 'tensor' does without.
            mode: 'loss' gives a dict of losses, 'predict' a list with one dict an image (``img_id``,
                ``img_path``, ``ori_shape``, ``boxes``, ``scores``, ``labels``, ``masks``; in pixels of
                the original image, best first), 'tensor' the pyramid.
        """
        features = self.extract_features(inputs)
        if mode == 'tensor':
            return features
        assert data_samples is not None
        if mode == 'loss':
            proposals, losses = self.rpn_head.loss(features, data_samples, self.train_proposal_cfg)
            return losses | self.roi_head.loss(features, proposals, data_samples)
        if mode == 'predict':
            proposals = self.rpn_head.predict(features, data_samples, self.test_proposal_cfg)
            results = self.roi_head.predict(features, proposals, data_samples)
            return [
                dict(img_id=s.img_id, img_path=s.img_path, ori_shape=s.ori_shape, **result)
                for s, result in zip(data_samples, results)]
        raise ValueError(f"mode={mode!r}: take 'loss', 'predict' or 'tensor'")


def _start(part: Any) -> None:
    """Call the ``init_weights`` of parts of other kinds, but not of what these are made of."""
    if hasattr(part, 'init_weights'):
        part.init_weights()
    elif any(base.__module__.startswith(('mmdet.', 'torch.nn.modules.container'))
             for base in type(part).__mro__):
        for child in part.children():
            _start(child)


def _check_fit(parts: dict[str, Any]) -> None:
    """Raise ValueError where a part's config does not fit another's: neither can see that alone."""
    if parts['roi_head'].get('mask_head') and not parts['roi_head'].get('mask_roi_extractor'):
        raise ValueError('model.roi_head.mask_head needs a model.roi_head.mask_roi_extractor')
    for kind, part, name, source, factor in _FITS:
        types = (getattr(value, '__name__', value) for value in _values(parts, f'{part}.type'))
        if {name.rpartition('.')[2].removesuffix('2019') for name in types} != {kind}:
            continue
        for taken, given in product(_values(parts, name), _values(parts, source)):
            if taken != factor * given:
                raise ValueError(f'model.{name}={taken} does not fit model.{source}={given}; '
                                 f'it must be {factor * given}')


def _values(part: Any, path: str) -> list[Any]:
    """What a config has at a.b.c, once for each stage where a part is a list; [] without it."""
    if isinstance(part, list | tuple):
        return [value for stage in part for value in _values(stage, path)]
    if not path:
        return [part]
    key, _, rest = path.partition('.')
    return _values(part[key], rest) if part and part.get(key) is not None else []
