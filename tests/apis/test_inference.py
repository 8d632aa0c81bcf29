"""The Python interface, on a small Mask R-CNN with random weights."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate

from mmdet.apis import inference_detector, init_detector, show_result
from mmdet.checkpoint import save_checkpoint
from mmdet.datasets.coco import COCO_CLASSES
from mmdet.registry import DATASETS
from mmdet.utils.config import load_config

CONFIG = Path(__file__).parents[2] / 'configs/gcnet/mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py'
OPTIONS = {
    'model.backbone.depth': 18,
    'model.backbone.pretrained': None,
    'model.neck.in_channels': [64, 128, 256, 512],
    'model.test_cfg.rpn.max_per_img': 20,
    'model.test_cfg.rcnn.score_thr': 0.0,
    'model.test_cfg.rcnn.max_per_img': 5,
    'test_dataloader.dataset.pipeline.1.scale': (160, 120),
}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    with pytest.warns(UserWarning):
        return init_detector(CONFIG, cfg_options=OPTIONS)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def test_a_file_an_array_and_a_list_give_the_same(model, image, tmp_path):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), image)
    one = inference_detector(model, image)
    assert one['boxes'].shape == (5, 4) and one['ori_shape'] == (60, 90) and not model.training
    assert (one['boxes'][:, 2] <= 90).all() and one['boxes'][:, 2].max() > 45
    assert [mask['size'] for mask in one['masks']] == [[60, 90]] * 5
    many = inference_detector(model, [path, image, str(path)])
    assert [result['img_id'] for result in many] == [0, 1, 2] and many[0]['img_path'] == str(path)
    for result in many:
        assert all(torch.equal(result[key], one[key]) for key in ('boxes', 'scores', 'labels'))
        assert result['masks'] == one['masks']
    assert inference_detector(model, []) == []
    for several in ((image, path), (picture for picture in (image, path))):
        assert [result['masks'] for result in inference_detector(model, several)] == [one['masks']] * 2


@pytest.mark.shared('coco128')
def test_results_are_those_of_the_data_set(model, shared_dir):
    options = dict(data_root=f'{shared_dir}/coco128/', indices=2)
    dataset = DATASETS.build(dict(model.cfg.test_dataloader.dataset, **options))
    for i in range(2):
        with torch.no_grad():  # as the test loop: with gradients another layout rounds otherwise
            expected = model.test_step(pseudo_collate([dataset[i]]))[0]
        found = inference_detector(model, expected['img_path'])
        assert all(torch.equal(found[key], expected[key]) for key in ('boxes', 'scores', 'labels'))


def test_weights_and_classes_come_from_the_checkpoint(model, image, tmp_path):
    classes = tuple(f'class {i}' for i in range(80))
    state = {name: value * 2 for name, value in model.state_dict().items()}
    save_checkpoint(dict(state_dict=state, meta=dict(dataset_meta=dict(classes=classes))), tmp_path / 'c.pth')
    loaded = init_detector(load_config(CONFIG), tmp_path / 'c.pth', cfg_options=OPTIONS)
    assert loaded.dataset_meta['classes'] == classes
    assert model.dataset_meta['classes'] == COCO_CLASSES
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    scores = [inference_detector(detector, image)['scores'] for detector in (loaded, model)]
    assert not torch.equal(*scores)


@pytest.mark.parametrize('classes', [(), tuple(f'class {i}' for i in range(80))])
def test_what_a_checkpoint_does_not_name_is_of_the_config_or_coco(model, classes, tmp_path):
    save_checkpoint(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=classes))),
                    tmp_path / 'c.pth')
    palette = OPTIONS | {'test_dataloader.dataset.metainfo': dict(palette=[[1, 2, 3]])}
    loaded = init_detector(CONFIG, tmp_path / 'c.pth', cfg_options=palette)
    assert loaded.dataset_meta == dict(classes=classes or COCO_CLASSES, palette=[[1, 2, 3]])


def test_the_transforms_of_a_data_set_are_taken(model, image, monkeypatch):
    expected = inference_detector(model, image)
    load, resize, pack = model.cfg.test_dataloader.dataset.pipeline
    more = [dict(type='LoadAnnotations', with_mask=True), dict(type='RandomFlip', prob=0.0)]
    monkeypatch.setitem(model.cfg.test_dataloader.dataset, 'pipeline', [load, resize, *more, pack])
    assert torch.equal(inference_detector(model, image)['boxes'], expected['boxes'])


@pytest.mark.parametrize('key, message', [
    ('model.test_cfg.rcnn.score_th', r"r50_fpn_1x.py: model.test_cfg.rcnn.score_th: .* 'score_thr'"),
    ('modle.neck', "modle: unknown top-level key; did you mean 'model'")])
def test_options_of_a_config_are_checked(key, message):
    with pytest.raises(ValueError, match=message):
        init_detector(load_config(CONFIG), cfg_options=OPTIONS | {key: 0.3})


def test_a_helper_variable_of_a_config_may_resemble_a_key(tmp_path):
    path = tmp_path / 'helper.py'
    path.write_text(f"_base_ = '{CONFIG}'\nmodels = dict(depth=18)\nmodel = dict(backbone=models)\n")
    with pytest.warns(UserWarning, match='random weights'):
        assert init_detector(load_config(path), cfg_options=OPTIONS).cfg.model.backbone.depth == 18


def test_a_detector_without_weights_says_so():
    with pytest.warns(UserWarning, match='the detector has random weights'):
        init_detector(CONFIG, cfg_options=OPTIONS)


def test_show_result_draws_and_writes(model, image, tmp_path):
    result = inference_detector(model, image)
    classes = model.dataset_meta['classes']
    picture = show_result(image, result, classes, score_thr=0, out_file=tmp_path / 'a/p.png')
    assert (cv2.imread(str(tmp_path / 'a/p.png')) == picture).all()
    plain = show_result(image, result, classes, score_thr=1.1)
    assert picture.shape == plain.shape and (picture != plain).any()


@pytest.mark.parametrize('images, error, message', [
    ('absent.jpg', FileNotFoundError, 'absent.jpg'),
    (np.zeros((4, 4), np.uint8), ValueError, r'^\(4, 4\) uint8 array is no image: give a path or an '),
    ([np.zeros((4, 4, 3))], ValueError, r'^\(4, 4, 3\) float64 array is no image'),
    (np.zeros((0, 4, 3), np.uint8), ValueError, r'^\(0, 4, 3\) uint8 array is no image'),
    (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, '^Tensor is no image'),
    (b'image.jpg', ValueError, '^bytes is no image'),
    (None, ValueError, '^NoneType is no image'),
    ([np.zeros((4, 4, 3), np.uint8), 5], ValueError, '^int is no image'),
])
def test_what_is_no_image_is_an_error(model, images, error, message):
    with pytest.raises(error, match=message):
        inference_detector(model, images)


def test_a_missing_checkpoint_is_an_error():
    with pytest.raises(FileNotFoundError, match='absent.pth does not exist'):
        init_detector(CONFIG, 'absent.pth', cfg_options=OPTIONS)


def test_a_checkpoint_of_2019_has_the_numerics_of_2019(model, tmp_path):
    save_checkpoint(dict(state_dict=model.state_dict(), meta=dict(legacy_2019=True)), tmp_path / 'e.pth')
    old = init_detector(CONFIG, tmp_path / 'e.pth', cfg_options=OPTIONS)
    assert type(old.rpn_head.anchor_generator).__name__ == 'AnchorGenerator2019'
    assert old.cfg.test_dataloader.dataset.pipeline[1].type == 'Resize2019'
    again = init_detector(old.cfg, tmp_path / 'e.pth')  # as a training with these numerics leaves its config
    assert type(again.roi_head.mask_head).__name__ == 'FCNMaskHead2019'


def test_a_mirrored_array_is_an_image(model, image):
    backwards = inference_detector(model, image[:, ::-1])
    assert torch.equal(backwards['boxes'], inference_detector(model, image[:, ::-1].copy())['boxes'])
