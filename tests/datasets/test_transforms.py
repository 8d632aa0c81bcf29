"""Transforms against OpenCV, pycocotools and formulas written out; files that are no good images."""
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from mmdet.datasets import transforms as T
from mmdet.datasets.coco import CocoDataset
from mmdet.datasets.masks import rasterise_masks, view_masks
from mmdet.registry import TRANSFORMS
from mmdet.structures.masks import encode_rle, masks_to_bitmaps

PIPELINE: list[dict[str, Any]] = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_mask=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.),
    dict(type='PackDetInputs'),
]


def photo(height: int = 40, width: int = 60) -> Image.Image:
    """Smooth colours, so that lossy files are close to it."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([4 * x, 5 * y, 2 * x + y], axis=-1).astype(np.uint8))


def load(path: Path, **expected: int) -> dict[str, Any]:
    return T.LoadImageFromFile().transform(dict(img_path=str(path), **expected))


def test_a_sliver_keeps_a_pixel():
    results = dict(img=np.zeros((2, 4000, 3), np.uint8), img_shape=(2, 4000))
    assert T.Resize((300, 300), keep_ratio=True).transform(results)['img'].shape == (1, 300, 3)


def test_the_registry_gives_our_transforms():
    for config in PIPELINE:
        assert type(TRANSFORMS.build(config)).__module__ == 'mmdet.datasets.transforms'


@pytest.mark.shared('coco128')
def test_coco_images_equal_opencv(shared_dir):
    for path in sorted((shared_dir / 'coco128/val2017').glob('*.jpg')):
        results = load(path)
        np.testing.assert_array_equal(results['img'], cv2.imread(str(path)))
        assert results['ori_shape'] == results['img_shape'] == results['img'].shape[:2]


@pytest.mark.parametrize('mode', ['RGB', 'L', 'LA', 'RGBA', 'P', '1', 'CMYK'])
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'gif', 'bmp', 'tiff'])
def test_all_kinds_of_images_become_bgr(tmp_path, mode, suffix):
    if (mode, suffix) in {('CMYK', 'png'), ('CMYK', 'gif'), ('CMYK', 'bmp'), ('LA', 'bmp')}:
        mode = 'L'  # no such files
    if suffix == 'jpg' and mode in ('LA', 'RGBA', 'P'):
        mode = 'L'
    path = tmp_path / f'a.{suffix}'
    photo().convert(mode).save(path)
    img = load(path)['img']
    assert img.shape == (40, 60, 3) and img.dtype == np.uint8
    expected = np.asarray(Image.open(path).convert('RGB'))[..., ::-1]
    assert np.abs(img.astype(int) - expected).max() <= (4 if suffix in ('jpg', 'webp') else 0)


def test_16_bit_png(tmp_path):
    values = (np.arange(2400).reshape(40, 60) * 27).astype(np.uint16)
    cv2.imwrite(str(tmp_path / 'a.png'), values)
    img = load(tmp_path / 'a.png')['img']
    np.testing.assert_array_equal(img, np.repeat(values[..., None] >> 8, 3, axis=2))


@pytest.mark.parametrize('orientation, turned', [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
    (5, lambda a: a.transpose(1, 0, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90),
])  # fmt: skip
def test_exif_orientation(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x112] = orientation
    photo().save(tmp_path / 'a.png', exif=exif)
    expected = turned(np.asarray(photo())[..., ::-1])
    height, width = expected.shape[:2]
    np.testing.assert_array_equal(load(tmp_path / 'a.png', height=height, width=width)['img'], expected)


def encoded(file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    photo(200, 300).save(stream, file_format, **options)
    return stream.getvalue()


@pytest.mark.parametrize('content', [
    b'', b'no image', b'\xff\xd8\xff', encoded('JPEG')[:1000], encoded('JPEG')[:-2], encoded('PNG')[:500],
    encoded('JPEG', progressive=True)[:2000], encoded('PNG')[:-50], encoded('BMP')[:-100], b'<html></html>',
])  # fmt: skip
def test_files_that_are_no_image(tmp_path, content):
    path = tmp_path / 'a.jpg'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='a.jpg cannot be decoded') as error:
        load(path)
    assert '\n' not in str(error.value)


def test_missing_image(tmp_path):
    with pytest.raises(FileNotFoundError, match='a.jpg'):
        load(tmp_path / 'a.jpg')


def test_another_size_than_annotated(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    photo().save(tmp_path / 'a.jpg', exif=exif)
    with pytest.raises(ValueError, match='a.jpg is 40 x 60 pixels .*EXIF.* says 60 x 40'):
        load(tmp_path / 'a.jpg', height=40, width=60)


@pytest.mark.shared('coco128')
def test_boxes_and_masks_equal_pycocotools(shared_dir):
    """Before resizing; a crowd between two objects must not shift the masks."""
    ann_file = str(shared_dir / 'coco128/annotations/instances_train2017.json')
    dataset = CocoDataset(ann_file, data_prefix=dict(img=str(shared_dir / 'coco128/train2017')),
                          pipeline=[*PIPELINE[:2], PIPELINE[-1]])
    reference = COCO(ann_file)
    cat_ids = reference.getCatIds()
    for i in range(len(dataset)):
        sample = dataset[i]['data_samples']
        objects = reference.loadAnns(reference.getAnnIds(imgIds=[sample.img_id], iscrowd=False))
        crowds = reference.loadAnns(reference.getAnnIds(imgIds=[sample.img_id], iscrowd=True))
        for boxes, annotations in ((sample.boxes, objects), (sample.ignored_boxes, crowds)):
            xywh = np.array([a['bbox'] for a in annotations]).reshape(-1, 4)
            expected = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
            assert boxes.dtype == torch.float32
            np.testing.assert_array_equal(boxes.numpy(), expected.astype(np.float32))
        assert sample.labels.tolist() == [cat_ids.index(a['category_id']) for a in objects]
        assert sample.labels.dtype == torch.int64
        bitmaps = masks_to_bitmaps(sample.masks, sample.ori_shape).numpy()
        assert bitmaps.dtype == np.uint8
        for mask, a in zip(bitmaps, objects, strict=True):
            np.testing.assert_array_equal(mask, reference.annToMask(a))


def test_crowd_between_objects_and_all_kinds_of_segmentation(make_coco):
    column_runs = [3, 2, 2000 - 5]  # pixels (x=0, y=3) and (0, 4)
    args = make_coco([
        dict(bbox=[2, 3, 10, 8]),
        dict(bbox=[1, 1, 9, 9], iscrowd=1, segmentation=dict(size=[40, 50], counts=[0, 2000])),
        dict(bbox=[0, 3, 1, 2], category_id=7, segmentation=dict(size=[40, 50], counts=column_runs)),
        dict(bbox=[5, 5, 4, 4], segmentation=[[5, 5, 9, 9]]),
        dict(bbox=[20, 20, 14, 14],
             segmentation=[[20, 20, 24, 20, 24, 24, 20, 24], [1, 2], [30, 30, 34, 30, 34, 34]])])
    sample = CocoDataset(**args, pipeline=[*PIPELINE[:2], PIPELINE[-1]])[0]['data_samples']
    assert sample.boxes.tolist() == [[2, 3, 12, 11], [0, 3, 1, 5], [20, 20, 34, 34]]
    assert sample.labels.tolist() == [0, 1, 0]
    assert sample.ignored_boxes.tolist() == [[1, 1, 10, 10], [5, 5, 9, 9]]
    bitmaps = masks_to_bitmaps(sample.masks, (40, 50))
    assert bitmaps[1].nonzero().tolist() == [[3, 0], [4, 0]]
    assert bitmaps[0, 3:11, 2:12].all() and bitmaps[0].sum() == 80
    assert bitmaps[2, 20:24, 20:24].all() and bitmaps[2, 26:].any()


def test_images_without_boxes(make_coco):
    dataset = CocoDataset(**make_coco([]), pipeline=PIPELINE)
    item = dataset[1]
    sample = item['data_samples']
    assert item['inputs'].shape == (3, 800, 1000)
    assert sample.boxes.shape == sample.ignored_boxes.shape == (0, 4) and sample.labels.shape == (0,)
    assert masks_to_bitmaps(sample.masks, (800, 1000)).shape == (0, 800, 1000)
    dtypes = [tensor.dtype for tensor in (sample.boxes, sample.labels, sample.masks.pixels)]
    assert dtypes == [torch.float32, torch.int64, torch.uint8]
    flipped = T.RandomFlip(1.).transform(dict(
        img=np.zeros((4, 6, 3), np.uint8), img_shape=(4, 6), masks=view_masks([], (4, 6)),
        boxes=np.zeros((0, 4), np.float32), rng=np.random.default_rng(0)))
    assert flipped['boxes'].shape == (0, 4) and bitmaps_of(flipped).shape == (0, 4, 6)


def test_test_pipeline_has_no_annotations(make_coco):
    args = make_coco([{}])
    item = CocoDataset(**args, test_mode=True, pipeline=[PIPELINE[0], PIPELINE[2], PIPELINE[-1]])[0]
    sample = item['data_samples']
    assert (sample.img_id, sample.ori_shape, sample.img_shape) == (0, (40, 50), (800, 1000))
    assert sample.img_path == f'{args["data_root"]}/img/0.png' and sample.scale_factor == (20., 20.)
    assert sample.boxes.shape == (0, 4) and sample.masks is None and not sample.flip


@pytest.mark.shared('golden_2019')
def test_sizes_of_1333x800(shared_dir):
    cases = json.loads((shared_dir / 'golden_2019/units.json').read_text())['image_resize_1333x800']
    assert len(cases) == 10
    for case in cases:
        height, width = case['ori']
        resized = T.Resize((1333, 800), keep_ratio=True).transform(
            dict(img=np.zeros((height, width, 3), np.uint8), img_shape=(height, width)))
        assert [*resized['img_shape'], 3] == case['img_shape'] == list(resized['img'].shape)
        new_height, new_width, _ = case['img_shape']
        assert resized['scale_factor'] == (new_width / width, new_height / height)


@pytest.mark.shared('coco128', 'reference')
def test_resized_images_boxes_and_masks_of_the_reference(shared_dir):
    """inputs.npz was made for mmdetection 3.3 from the first two images with objects, 533 x 320."""
    inputs = np.load(shared_dir / 'reference/inputs.npz')
    dataset = CocoDataset('annotations/instances_train2017.json', data_root=str(shared_dir / 'coco128'),
                          data_prefix=dict(img='train2017'), filter_cfg=dict(filter_empty_gt=True),
                          pipeline=[*PIPELINE[:2], PIPELINE[2] | dict(scale=[533, 320]), PIPELINE[-1]])
    for i in range(2):
        item, shape = dataset[i], inputs[f'masks_shape_{i}']
        sample = item['data_samples']
        assert sample.img_id == inputs[f'id_{i}']
        np.testing.assert_array_equal(item['inputs'].permute(1, 2, 0).numpy(), inputs[f'img_{i}'])
        height, width = sample.img_shape
        unclipped = inputs[f'boxes_{i}']
        np.testing.assert_allclose(sample.boxes, unclipped.clip(0, [width, height] * 2), rtol=0, atol=1e-4)
        assert sample.labels.tolist() == inputs[f'labels_{i}'].tolist()
        masks = np.unpackbits(inputs[f'masks_packed_{i}'])[:shape.prod()].reshape(shape)
        np.testing.assert_array_equal(masks_to_bitmaps(sample.masks, sample.img_shape), masks)


def results_of(height: int, width: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    bitmaps = torch.from_numpy(rng.integers(0, 2, (2, height, width), dtype=np.uint8))
    return dict(
        img=rng.integers(0, 256, (height, width, 3), dtype=np.uint8), img_shape=(height, width),
        boxes=np.array([[1, 2, 5, 7], [-3, -4, width + 5, height + 6]], np.float32),
        ignored_boxes=np.array([[0, 0, 2, 3]], np.float32), labels=np.array([0, 1]),
        masks=view_masks(encode_rle(bitmaps), (height, width)), rng=rng)


def bitmaps_of(results: dict[str, Any]) -> np.ndarray:
    return masks_to_bitmaps(rasterise_masks(results['masks']), results['img_shape']).numpy()


def test_resize_without_ratio():
    results, before = T.Resize(scale=[30, 10]).transform(results_of(20, 15)), results_of(20, 15)
    np.testing.assert_array_equal(results['img'], cv2.resize(before['img'], (30, 10)))
    assert results['img_shape'] == (10, 30) and results['scale_factor'] == (2., .5)
    assert results['boxes'].tolist() == [[2, 1, 10, 3.5], [0, 0, 30, 10]]
    assert results['ignored_boxes'].tolist() == [[0, 0, 4, 1.5]]
    # Nearest: pixel x of the result is pixel floor(x * old / new).
    masks, masks_before = bitmaps_of(results), bitmaps_of(before)
    np.testing.assert_array_equal(masks, masks_before[:, ::2][:, :, np.arange(30) // 2])
    assert results['boxes'].dtype == np.float32


def test_flip():
    results, before = T.RandomFlip(prob=1.).transform(results_of(9, 15)), results_of(9, 15)
    assert results['flip'] is True
    np.testing.assert_array_equal(results['img'], before['img'][:, ::-1])
    masks, masks_before = bitmaps_of(results), bitmaps_of(before)
    np.testing.assert_array_equal(masks, masks_before[:, :, ::-1])
    assert results['boxes'].tolist() == [[10, 2, 14, 7], [-5, -4, 18, 15]]
    assert results['ignored_boxes'].tolist() == [[13, 0, 15, 3]]
    kept = T.RandomFlip(prob=0.).transform(results_of(9, 15))
    assert kept['flip'] is False and kept['boxes'].tolist() == before['boxes'].tolist()


def test_random_transforms_draw_from_the_given_generator():
    flip, resize = T.RandomFlip(0.3), T.RandomChoiceResize([(30, 20), (60, 40), (90, 50)])
    flips, widths = [], []
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()
    for seed in range(300):
        results = flip.transform(resize.transform(results_of(20, 30) | dict(rng=np.random.default_rng(seed))))
        expected = np.random.default_rng(seed)
        assert results['img_shape'] == [(20, 30), (40, 60), (50, 75)][expected.integers(3)]
        assert results['flip'] == (expected.random() < 0.3)
        flips.append(results['flip'])
        widths.append(results['img_shape'][1])
    assert np.random.get_state()[1].tolist() == state
    assert 60 < sum(flips) < 120 and min(widths.count(w) for w in (30, 60, 75)) > 70


def test_pack_gives_contiguous_bgr():
    results = results_of(9, 15) | dict(img_id=3, img_path='a', ori_shape=(9, 15))
    item = T.PackDetInputs().transform(results)
    assert item['inputs'].shape == (3, 9, 15) and item['inputs'].is_contiguous()
    np.testing.assert_array_equal(item['inputs'].numpy(), results['img'].transpose(2, 0, 1))


@pytest.mark.parametrize('build, message', [
    (lambda: T.Resize(800), 'two positive integers'),
    (lambda: T.Resize((800, 0)), 'two positive integers'),
    (lambda: T.Resize((1333, 800, 3)), 'two positive integers'),
    (lambda: T.RandomChoiceResize([8]), 'two positive integers'),
    (lambda: T.RandomChoiceResize([]), 'at least one scale'),
    (lambda: T.RandomFlip(1.5), r'in \[0, 1\], not 1.5'),
])  # fmt: skip
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
