from collections.abc import Callable

import pytest
import torch
from pycocotools import mask as coco_mask

from mmdet.models.detectors.two_stage import TwoStageDetector
from mmdet.registry import MODELS

LOSSES = {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask', 'acc'}
NO_MASKS = ('roi_head.mask_head', None, 'roi_head.mask_roi_extractor', None)
EAGER = ('test_cfg.rcnn.score_thr', 0.0)


def total(losses: dict) -> torch.Tensor:
    return sum(loss for name, loss in losses.items() if 'loss' in name)


@pytest.fixture
def samples(make_sample: Callable) -> list:
    """Two images of different size: objects and a crowd, and nothing."""
    first = make_sample([[8., 8., 40., 40.], [50., 10., 90., 60.]], [1, 4], crowd=[[0., 40., 30., 64.]])
    return [first, make_sample([], shape=(90, 50))]


@pytest.mark.parametrize('empty', [False, True], ids=['one image has objects', 'none has'])
def test_a_training_step_reaches_every_parameter(
        build: Callable, make_batch: Callable, make_sample: Callable, samples: list, empty: bool) -> None:
    model = build().train()
    batch = make_batch(*([make_sample([]), samples[1]] if empty else samples))
    data = model.data_preprocessor(batch, training=True)
    assert data['inputs'].shape == (2, 3, 96, 96)
    losses = model(**data, mode='loss')
    assert set(losses) == LOSSES and all(loss.isfinite() for loss in losses.values())
    if empty:
        assert losses['loss_rpn_bbox'] == losses['loss_bbox'] == losses['loss_mask'] == 0
    total(losses).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize('changes', [(), NO_MASKS], ids=['Mask R-CNN', 'Faster R-CNN'])
def test_results(build: Callable, make_batch: Callable, samples: list, changes: tuple) -> None:
    model = build(*changes, *EAGER).eval()
    if changes:
        del model.roi_head.test_cfg['mask_thr_binary']
    samples[0].ori_shape, samples[0].scale_factor = (32, 192), (0.5, 2.0)
    with torch.no_grad():
        results = model.test_step(make_batch(*samples))
    assert [r['ori_shape'] for r in results] == [(32, 192), (90, 50)]
    for result in results:
        assert result['img_id'] == 7 and result['img_path'] == 'image 7'
        number = len(result['boxes'])
        assert 0 < number <= 30
        assert result['boxes'].dtype == result['scores'].dtype == torch.float32
        assert result['labels'].dtype == torch.int64 and result['labels'].max() < 5
        assert (result['scores'].diff() <= 0).all()
        height, width = result['ori_shape']
        assert (result['boxes'] >= 0).all() and (result['boxes'] <= torch.tensor([width, height] * 2)).all()
        assert ('masks' in result) == (not changes)
        for rle, box in zip(result.get('masks', []), result['boxes'].tolist()):
            assert rle['size'] == [height, width] and isinstance(rle['counts'], bytes)
            x, y, w, h = coco_mask.toBbox(rle)
            inside = x >= box[0] - 1 and y >= box[1] - 1 and x + w <= box[2] + 1 and y + h <= box[3] + 1
            assert w == 0 or inside


def test_faster_rcnn_trains_without_masks(build: Callable, make_batch: Callable, samples: list) -> None:
    model = build(*NO_MASKS).train()
    samples[0].masks = None
    losses = model(**model.data_preprocessor(make_batch(*samples)), mode='loss')
    assert set(losses) == LOSSES - {'loss_mask'}
    total(losses).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_batch_gives_what_its_images_give_alone(
        build: Callable, make_batch: Callable, make_sample: Callable) -> None:
    model = build(*EAGER).double().eval()
    batch = make_batch(make_sample([]), make_sample([]))
    with torch.no_grad():
        together = model.test_step(batch)
        for i in range(2):
            alone, = model.test_step({key: value[i:i + 1] for key, value in batch.items()})
            for key in ('boxes', 'scores', 'labels'):
                torch.testing.assert_close(together[i][key], alone[key], rtol=0, atol=1e-9)
            assert together[i]['masks'] == alone['masks']


def test_other_modes(build: Callable) -> None:
    model = build().eval()
    with torch.no_grad():
        pyramid = model(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape) for level in pyramid] == [(1, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    with pytest.raises(ValueError, match="mode='train': take 'loss', 'predict' or 'tensor'"):
        model(torch.zeros(1, 3, 64, 96), [], mode='train')


def test_bfloat16(build: Callable, make_batch: Callable, samples: list) -> None:
    model = build(*EAGER)
    batch = make_batch(*samples)
    data = model.data_preprocessor(batch)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model.train()(**data, mode='loss')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.manual_seed(0)
        losses = model.train()(**data, mode='loss')
        results = model.eval().test_step(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    for name, bound in dict(loss_rpn_cls=0.02, loss_cls=0.1, loss_mask=0.3).items():
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=bound), name
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert results[0]['boxes'].dtype == results[0]['scores'].dtype == torch.float32


def test_every_name_is_the_same_class() -> None:
    assert MODELS.get('MaskRCNN') is MODELS.get('FasterRCNN') is TwoStageDetector


@pytest.mark.parametrize('changes, message', [
    (('neck.out_channels', 8),
     'rpn_head.in_channels=16 does not fit model.neck.out_channels=8; it must be 8'),
    (('roi_head.bbox_roi_extractor.out_channels', 8),
     'roi_head.bbox_roi_extractor.out_channels=8 does not fit model.neck.out_channels=16; it must be 16'),
    (('roi_head.bbox_head.in_channels', 8), 'roi_head.bbox_head.in_channels=8 does not fit'),
    (('roi_head.bbox_head.roi_feat_size', 14),
     'roi_head.bbox_head.roi_feat_size=14 does not fit '
     'model.roi_head.bbox_roi_extractor.roi_layer.output_size=7'),
    (('roi_head.mask_roi_extractor.roi_layer.output_size', 7),
     'train_cfg.rcnn.mask_size=28 does not fit model.roi_head.mask_roi_extractor.roi_layer.output_size=7; '
     'it must be 14'),
    (('roi_head.mask_roi_extractor', None), 'roi_head.mask_head needs a model.roi_head.mask_roi_extractor'),
])
def test_parts_that_do_not_fit(build: Callable, changes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f'model.{message}'):
        build(*changes)


@pytest.mark.parametrize('kind', ['FCNMaskHead2019', 'mmdet.FCNMaskHead'])
def test_other_names_of_a_part_have_to_fit_as_well(build: Callable, kind: str) -> None:
    with pytest.raises(ValueError, match='mask_head.in_channels=8 does not fit'):
        build('roi_head.mask_head.type', kind, 'roi_head.mask_head.in_channels', 8)


def test_another_head_may_take_another_size(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    class Head(MODELS.get('FCNMaskHead')):
        pass

    monkeypatch.setitem(MODELS.module_dict, 'AnotherHead', Head)
    build('roi_head.mask_head.type', 'AnotherHead', 'train_cfg.rcnn.mask_size', 14)


def test_parts_of_other_kinds_start_as_they_say(build: Callable) -> None:
    class Plain(torch.nn.Module):
        pretrained = True  # as timm has it

        def init_weights(self) -> None:
            self.started = True

    model = build()
    model.roi_head.__class__ = type('Derived', (type(model.roi_head),), dict(__module__='elsewhere'))
    model.backbone, model.roi_head.bbox_head = Plain(), Plain()
    model.init_weights()
    assert model.backbone.started and model.roi_head.bbox_head.started


def test_what_a_part_of_another_kind_is_made_of_stays_as_it_made_it(build: Callable) -> None:
    class Inner(torch.nn.Module):
        def init_weights(self) -> None:
            raise AssertionError('it may be pretrained')

    class Wrapper(torch.nn.Module):
        pretrained = 'openai'

        def __init__(self) -> None:
            super().__init__()
            self.net = Inner()

    model = build()
    model.neck = Wrapper()
    model.init_weights()


def test_init_weights_loads_the_backbone(build: Callable, tmp_path) -> None:
    donor = build()
    torch.nn.init.normal_(donor.backbone.conv1.weight)
    weights = {k: v for k, v in donor.backbone.state_dict().items() if 'context' not in k}
    torch.save(weights, tmp_path / 'r18.pth')
    model = build('backbone.pretrained', str(tmp_path / 'r18.pth'))
    block = model.backbone.layer2[0].context_block.conv_mask.weight.clone()
    assert not torch.equal(model.backbone.conv1.weight, donor.backbone.conv1.weight)
    model.init_weights()
    assert torch.equal(model.backbone.conv1.weight, donor.backbone.conv1.weight)
    assert torch.equal(model.backbone.layer2[0].context_block.conv_mask.weight, block)
