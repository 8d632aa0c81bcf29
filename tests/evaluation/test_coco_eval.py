"""The COCO numbers, held against pycocotools run by hand."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval, Params

from mmdet.evaluation.coco_eval import (
    STAT_NAMES,
    count_matches,
    run_coco_eval,
    select_ground_truth,
    summary_lines,
)
from mmdet.structures.masks import segmentation_to_rle
from mmdet.utils.coco_file import read_annotation_file


def test_summary_lines_are_those_of_pycocotools():
    evaluator = COCOeval.__new__(COCOeval)
    evaluator.params = Params('bbox')
    evaluator.eval = dict(precision=np.full((10, 101, 1, 4, 3), 0.25), recall=np.full((10, 1, 4, 3), 0.5))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluator.summarize()
    assert summary_lines(evaluator.stats) == printed.getvalue().rstrip('\n').split('\n')


def noisy_records(content, rng):
    """Detections from shifted ground truth (crowds too), with tied scores, duplicates and strangers."""
    images = {image['id']: image for image in content['images']}
    cat_ids = [category['id'] for category in content['categories']]
    bbox, segm = [], []
    for annotation in content['annotations']:
        image = images[annotation['image_id']]
        rle = segmentation_to_rle(annotation['segmentation'], image['height'], image['width'])
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = annotation['bbox'] + rng.normal(0, rng.choice([0, 2, 10]), 4)
            category = int(rng.choice(cat_ids)) if rng.random() < 0.2 else annotation['category_id']
            head = dict(image_id=image['id'], category_id=category)
            score = float(np.float32(round(rng.random(), 1)))
            shift = [int(s) for s in rng.integers(-6, 7, 2)]
            moved = coco_mask.encode(np.asfortranarray(np.roll(coco_mask.decode(rle), shift, (0, 1))))
            bbox.append(head | dict(bbox=[x, y, max(w, 1.0), max(h, 1.0)], score=score))
            segm.append(head | dict(
                segmentation=dict(size=moved['size'], counts=moved['counts'].decode()), score=score))
    order = rng.permutation(len(bbox))
    return dict(bbox=[bbox[i] for i in order], segm=[segm[i] for i in order])


def square(image_id, category_id, x, y, side, **more):
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    return dict(image_id=image_id, category_id=category_id, bbox=[x, y, side, side], area=side * side,
                iscrowd=0, segmentation=[corners]) | more


@pytest.fixture
def small():
    """Two images, two classes and three squares."""
    annotations = [square(1, 3, 10, 10, 40), square(1, 5, 60, 60, 20), square(2, 3, 20, 20, 50)]
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=100, width=120) for i in (1, 2)],
        categories=[dict(id=3, name='cat'), dict(id=5, name='dog')],
        annotations=[dict(a, id=i) for i, a in enumerate(annotations, 1)])


def perfect(content):
    return [dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=0.9)
            for a in content['annotations']]


@pytest.mark.shared('coco128')
@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_both_backends_equal_pycocotools_to_the_bit(shared_dir, tmp_path, pycocotools_stats, iou_type):
    ann_file = shared_dir / 'coco128/annotations/instances_train2017.json'
    content = read_annotation_file(ann_file)
    records = noisy_records(content, np.random.default_rng(0))[iou_type]
    (tmp_path / 'results.json').write_text(json.dumps(records))
    expected = pycocotools_stats(ann_file, tmp_path / 'results.json', iou_type)
    assert 0.2 < expected[0] < 0.9 and len(set(expected)) >= 10

    truth = select_ground_truth(content, [i['id'] for i in content['images']],
                                [c['id'] for c in content['categories']])
    scores = {name: run_coco_eval(truth, records, iou_type, name) for name in ('hotcoco', 'pycocotools')}
    for result in scores.values():
        assert result.stats.tobytes() == expected.tobytes()
    assert scores['hotcoco'].class_ap.tobytes() == scores['pycocotools'].class_ap.tobytes()
    present = scores['hotcoco'].class_ap[:, 0] > -1
    assert scores['hotcoco'].class_ap[present, 0].mean() == pytest.approx(expected[0], abs=1e-12)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_backends_agree_on_random_squares(seed, iou_type):
    rng = np.random.default_rng(seed)
    annotations = [square(int(rng.integers(6)), int(rng.integers(3)), *map(float, rng.uniform(0, 60, 2)),
                          float(rng.uniform(5, 60)), iscrowd=int(rng.random() < 0.2),
                          ignore=int(rng.random() < 0.2))
                   for _ in range(60)]
    content = dict(
        images=[dict(id=i, height=120, width=120) for i in (4, 0, 5, 2, 1, 3)],
        categories=[dict(id=i, name=f'c{i}') for i in (2, 0, 1)],
        annotations=[dict(a, id=i) for i, a in enumerate(annotations)])
    records = noisy_records(content, rng)[iou_type]
    truth = select_ground_truth(content, [4, 0, 5, 2, 1, 3], [2, 0, 1])
    ours, reference = (run_coco_eval(truth, records, iou_type, name) for name in ('hotcoco', 'pycocotools'))
    assert 0 < reference.stats[0] < 1
    assert ours.stats.tobytes() == reference.stats.tobytes()
    assert ours.class_ap.tobytes() == reference.class_ap.tobytes()


@pytest.mark.parametrize('backend', ['hotcoco', 'pycocotools'])
def test_what_other_tools_write_into_a_file_does_not_matter(small, backend):
    small['images'][0].update(date_captured=0, license=None, coco_url=None, flickr_url=7)
    small['categories'][0].update(supercategory=None, keypoints=1)
    truth = select_ground_truth(small, [1, 2], [3, 5])
    assert run_coco_eval(truth, perfect(small), 'bbox', backend).stats[0] == pytest.approx(1)


@pytest.mark.parametrize('backend', ['hotcoco', 'pycocotools'])
def test_annotation_id_zero_counts(small, backend, tmp_path, pycocotools_stats):
    """pycocotools takes "matched to id 0" for "not matched"; the number must be that of other ids."""
    records = perfect(small)
    for annotation in small['annotations']:
        annotation['id'] -= 1
    (tmp_path / 'gt.json').write_text(json.dumps(small))
    (tmp_path / 'dt.json').write_text(json.dumps(records))
    assert pycocotools_stats(tmp_path / 'gt.json', tmp_path / 'dt.json', 'bbox')[0] < 0.9
    truth = select_ground_truth(small, [1, 2], [3, 5])
    assert run_coco_eval(truth, records, 'bbox', backend).stats[0] == pytest.approx(1)


@pytest.mark.parametrize('backend', ['hotcoco', 'pycocotools'])
def test_repeated_annotation_ids_all_count(small, backend):
    records = perfect(small)[:1]
    for annotation in small['annotations']:
        annotation['id'] = 7
    truth = select_ground_truth(small, [1, 2], [3, 5])
    assert [a['id'] for a in truth['annotations']] == [1, 2, 3]
    # One of two cats is found: 51 of the 101 recall thresholds; no dog is.
    assert run_coco_eval(truth, records, 'bbox', backend).stats[0] == pytest.approx(51 / 101 / 2)


@pytest.mark.parametrize('backend', ['hotcoco', 'pycocotools'])
@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_empty_results_are_zero_where_there_is_ground_truth(small, backend, iou_type):
    truth = select_ground_truth(small, [1, 2], [3, 5])
    stats = dict(zip(STAT_NAMES, run_coco_eval(truth, [], iou_type, backend).stats))
    large = {name: stats.pop(name) for name in ('mAP_l', 'AR_l@100')}
    assert set(stats.values()) == {0}
    assert set(large.values()) == {-1}  # no square is larger than 96 x 96


@pytest.mark.parametrize('backend', ['hotcoco', 'pycocotools'])
def test_no_ground_truth_is_minus_one(small, backend):
    records = perfect(small)
    small['annotations'] = []
    truth = select_ground_truth(small, [1, 2], [3, 5])
    assert run_coco_eval(truth, records, 'bbox', backend).stats.tolist() == [-1] * 12


def test_only_the_images_and_categories_asked_for_count(small):
    truth = select_ground_truth(small, [1], [3])
    assert [(a['image_id'], a['category_id']) for a in truth['annotations']] == [(1, 3)]
    assert [i['id'] for i in truth['images']] == [1] and [c['id'] for c in truth['categories']] == [3]


def test_absent_fields_are_filled_in(small):
    for annotation in small['annotations']:
        del annotation['iscrowd'], annotation['area'], annotation['id']
    small['annotations'][0].update(iscrowd=None, area=None, id=None)
    truth = select_ground_truth(small, [1, 2], [3, 5])
    assert [a['area'] for a in truth['annotations']] == [1600, 400, 2500]
    assert run_coco_eval(truth, perfect(small), 'bbox').stats[0] == pytest.approx(1)


def test_unknown_ids_are_errors(small):
    with pytest.raises(ValueError, match='image id 9 of the results'):
        select_ground_truth(small, [1, 9], [3])
    with pytest.raises(ValueError, match='category id 8 of the results'):
        select_ground_truth(small, [1], [8])


@pytest.mark.parametrize('wrong', [
    dict(bbox=[0, 0, float('nan'), 5]), dict(bbox=[1, 2]), dict(bbox=[]), dict(bbox=['0', 0, 5, 5]),
    dict(area=float('nan')), dict(area='25')])
def test_invalid_boxes_are_errors(small, wrong):
    small['annotations'][1] |= wrong
    with pytest.raises(ValueError, match='annotation 2 of image 1 has no valid bbox'):
        select_ground_truth(small, [1, 2], [3, 5])


def test_masks_that_cannot_be_compared_are_errors(small):
    truth = select_ground_truth(small, [1, 2], [3, 5])
    record = dict(image_id=1, category_id=3, score=0.5, segmentation=dict(size=[120, 100], counts='PPYi0'))
    with pytest.raises(ValueError, match=r'image id 1: masks are \[120, 100\].*\[100, 120\]'):
        run_coco_eval(truth, [record], 'segm')


@pytest.mark.parametrize('segmentation, problem', [
    ([], 'has no segmentation'), (None, 'has no segmentation'),
    ([[1, 1, 5, 5]], 'has a polygon of fewer than 3 points'),
    ([[1, 1, 5, 5, float('nan'), 5]], 'has a polygon with a coordinate that is NaN'),
    (dict(counts=[12000]), r'has no RLE of the size of its image, \[100, 120\]'),
    (dict(counts=[12000], size=[120, 100]), r'has no RLE of the size of its image, \[100, 120\]'),
])
def test_invalid_segmentations_are_errors_of_segm_only(small, segmentation, problem):
    small['annotations'][0]['segmentation'] = segmentation
    truth = select_ground_truth(small, [1, 2], [3, 5])
    for backend in ('hotcoco', 'pycocotools'):
        with pytest.raises(ValueError, match=rf'the annotation of image id 1 with bbox \[10.* {problem}'):
            run_coco_eval(truth, [], 'segm', backend)
        assert run_coco_eval(truth, perfect(small), 'bbox', backend).stats[0] == pytest.approx(1)


def test_count_matches_ignores_the_class_and_crowds(small):
    records = [dict(r, category_id=3) for r in perfect(small)]
    small['annotations'][2]['iscrowd'] = 1
    truth = select_ground_truth(small, [1, 2], [3, 5])
    assert count_matches(truth, records, 'bbox') == 2
    assert count_matches(truth, records[:1], 'bbox') == 1
    for width, matches in ((20, 1), (19.9, 0)):  # of 40: an IoU of 0.5 is enough
        assert count_matches(truth, [dict(records[0], bbox=[10, 10, width, 40])], 'bbox') == matches
    mask = segmentation_to_rle(small['annotations'][0]['segmentation'], 100, 120)
    assert count_matches(truth, [dict(records[0], segmentation=mask)], 'segm') == 1
