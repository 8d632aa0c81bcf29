"""CocoMetric: the files it writes, the numbers it returns, what it says about bad results."""

import io
import json
import logging
import pickle
import subprocess
import sys
import textwrap
import types
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from pycocotools import mask as coco_mask

from mmdet.evaluation import CocoMetric, coco_metric
from mmdet.evaluation.coco_metric import check_annotations, interleave, to_records
from mmdet.registry import METRICS

CLASSES = ('dog', 'cat')
CAT_IDS = (5, 3)
SIZE = (100, 120)


def rle(x, y, side):
    mask = np.zeros(SIZE, np.uint8, order='F')
    mask[y:y + side, x:x + side] = 1
    return coco_mask.encode(mask)


def write_annotations(path, n_images=5):
    """Image 10 * i holds a cat, and a dog where i is even; the last one a crowd of dogs as well."""
    annotations = []
    for i in range(n_images):
        for category, (x, y, side) in [(3, (10, 10, 40)), (5, (60, 50 - i, 30))][:2 - i % 2]:
            segmentation = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            annotations.append(dict(
                id=len(annotations) + 1, image_id=10 * i, category_id=category, bbox=[x, y, side, side],
                area=side * side, iscrowd=0, segmentation=segmentation))
    annotations.append(dict(annotations[-1], id=len(annotations) + 1, iscrowd=1))
    path.write_text(json.dumps(dict(
        images=[dict(id=10 * i, file_name=f'{i}.jpg', height=100, width=120) for i in range(n_images)],
        categories=[dict(id=3, name='cat'), dict(id=5, name='dog')],
        annotations=annotations)))
    return path


def prediction(i, with_masks=True, **more):
    """A right cat, a dog at a fixed place (right up to the image number) and a false cat."""
    squares = [(10, 10, 40), (60, 50, 30), (5 * i, 30, 20)]
    content = dict(
        img_id=10 * i, img_path=f'/data/{i}.jpg', ori_shape=SIZE,
        boxes=torch.tensor([[x + 0.1, y, x + s, y + s] for x, y, s in squares]),
        scores=torch.tensor([0.9, 0.8, 0.1 * i]), labels=torch.tensor([1, 0, 1]))
    if with_masks:
        content['masks'] = [rle(*square) for square in squares]
    return content | more


def build(ann_file, **arguments):
    metric = METRICS.build(dict(type='CocoMetric', **arguments))
    metric.dataset_meta = dict(classes=CLASSES, cat_ids=CAT_IDS, ann_file=str(ann_file))
    return metric


def evaluate(metric, predictions):
    for item in predictions:
        metric.process(None, [item])
    return metric.evaluate(len(predictions))


@pytest.fixture
def ann_file(tmp_path):
    return write_annotations(tmp_path / 'gt.json')


@pytest.fixture
def log():
    """What the current logger is told."""
    logger = MMLogger.get_current_instance()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


@pytest.mark.parametrize('backend', ['hotcoco', 'pycocotools'])
def test_numbers_equal_pycocotools_on_the_written_json(ann_file, tmp_path, pycocotools_stats, backend, log):
    metric = build(ann_file, eval_backend=backend, outfile_prefix=str(tmp_path / 'new' / 'r'))
    numbers = evaluate(metric, [prediction(i) for i in range(5)])
    assert len(numbers) == 24 and 0.3 < numbers['coco/bbox_mAP'] < 0.99
    names = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l',
             'AR@1', 'AR@10', 'AR@100', 'AR_s@100', 'AR_m@100', 'AR_l@100']
    for iou_type in ('bbox', 'segm'):
        expected = pycocotools_stats(ann_file, tmp_path / f'new/r.{iou_type}.json', iou_type)
        assert [numbers[f'coco/{iou_type}_{name}'] for name in names] == expected.tolist()
        assert f'IoU=0.50:0.95 | area=   all | maxDets=100 ] = {expected[0]:.3f}' in log.getvalue()
    table = [[cell.strip() for cell in line.split('|')] for line in log.getvalue().splitlines()]
    rows = [row[1:4] for row in table if row[1:2] in (['cat'], ['dog'])]
    assert rows == [['cat', '5', '10'], ['dog', '3', '5']] * 2
    assert 'Likely cause' not in log.getvalue()


def test_files_hold_plain_data_in_data_set_order(ann_file, tmp_path):
    metric = build(ann_file, out=str(tmp_path / 'r.pkl'), outfile_prefix=str(tmp_path / 'r'))
    evaluate(metric, [prediction(i) for i in range(5)])
    assert metric.results == []
    (box, *_), (mask, *_) = (json.loads((tmp_path / f'r.{t}.json').read_text()) for t in ('bbox', 'segm'))
    x = float(np.float32(10.1))
    assert box == dict(image_id=0, category_id=3, bbox=[x, 10, 50 - x, 40], score=float(np.float32(0.9)))
    assert mask == dict(image_id=0, category_id=3, score=float(np.float32(0.9)), segmentation=dict(
        size=list(SIZE), counts=rle(10, 10, 40)['counts'].decode()))

    code = textwrap.dedent("""
        import pickle, sys
        results = pickle.load(open(sys.argv[1], 'rb'))
        assert not {'torch', 'mmdet', 'mmengine'} & set(sys.modules)
        first = results[0]
        print([r['img_id'] for r in results], sorted(first), first['img_path'], first['ori_shape'])
        print(*(first[key].dtype for key in ('boxes', 'scores', 'labels')), first['boxes'].shape)
        print(first['masks'][0])
    """)
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'r.pkl'], stdout=subprocess.PIPE, text=True,
                          check=True)
    assert done.stdout.splitlines() == [
        "[0, 10, 20, 30, 40] ['boxes', 'img_id', 'img_path', 'labels', 'masks', 'ori_shape', 'scores'] "
        '/data/0.jpg (100, 120)',
        'float32 float32 int64 (3, 4)',
        str(rle(10, 10, 40))]


def test_files_alone_need_no_annotation_file(tmp_path):
    metric = build(tmp_path / 'absent.json', metric=[], outfile_prefix=str(tmp_path / 'r'))
    assert evaluate(metric, [prediction(0, with_masks=False)]) == {}
    assert [path.name for path in tmp_path.iterdir()] == ['r.bbox.json']


def test_masks_still_being_encoded(ann_file):
    """They are waited for when the next batch comes, or at the end."""
    def encoding(i):
        return prediction(i, masks=Future())

    def finish(item, i):
        item['masks'].set_result(prediction(i)['masks'])

    expected = evaluate(build(ann_file), [prediction(i) for i in range(3)])
    metric = build(ann_file)
    first, second = encoding(0), encoding(1)
    metric.process(None, [first])
    assert metric.results == []
    finish(first, 0)
    metric.process(None, [second])
    assert [kept['img_id'] for kept in metric.results] == [first['img_id']]
    finish(second, 1)
    metric.process(None, [prediction(2)])
    assert len(metric.results) == 3
    assert metric.evaluate(3) == expected
    failed = encoding(0)
    failed['masks'].set_exception(RuntimeError('no memory'))
    metric.process(None, [failed])
    with pytest.raises(RuntimeError, match='no memory'):
        metric.evaluate(1)


def test_two_processes_write_the_same_bytes(ann_file, tmp_path):
    """Five images on two processes: the sampler pads with image 0, which must be cut off again."""
    evaluate(build(ann_file, out=str(tmp_path / 'one.pkl'), outfile_prefix=str(tmp_path / 'one')),
             [prediction(i) for i in range(5)])
    code = textwrap.dedent("""
        import sys
        import torch.distributed as dist
        from mmengine.dataset import DefaultSampler
        tests, folder, rank = sys.argv[1:]
        sys.path.insert(0, tests)
        from test_coco_metric import build, prediction
        dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=int(rank), world_size=2)
        metric = build(f'{folder}/gt.json', out=f'{folder}/two.pkl', outfile_prefix=f'{folder}/two')
        indices = list(DefaultSampler(range(5), shuffle=False))
        assert len(indices) == 3
        for i in indices:
            metric.process(None, [prediction(i)])
        print(metric.evaluate(5)['coco/segm_mAP'])
        dist.destroy_process_group()  # else gloo's threads may abort the process at its end
    """)
    command = [sys.executable, '-c', code, Path(__file__).parent, tmp_path]
    run = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True) for rank in '01']
    numbers = [process.communicate(timeout=120)[0].splitlines()[-1] for process in run]
    assert [process.returncode for process in run] == [0, 0]
    assert numbers[0] == numbers[1] and 0 < float(numbers[0]) < 1
    for name in ('bbox.json', 'segm.json'):
        assert (tmp_path / f'one.{name}').read_bytes() == (tmp_path / f'two.{name}').read_bytes()
    one, two = (pickle.loads((tmp_path / f'{name}.pkl').read_bytes()) for name in ('one', 'two'))
    assert str(one) == str(two)


def test_interleave_restores_the_order_of_the_data_set():
    assert interleave([[0, 3, 6], [1, 4], [2, 5]]) == list(range(7)) and interleave([]) == []


def test_only_the_tested_images_are_evaluated(ann_file, log):
    numbers = evaluate(build(ann_file, metric='bbox'), [prediction(0)])
    assert numbers['coco/bbox_AR@100'] == 1
    assert 'Evaluating the 1 images tested, of 5' in log.getvalue()


def test_classes_may_be_a_part_of_the_categories(ann_file):
    metric = build(ann_file, metric='bbox')
    metric.dataset_meta = dict(classes=('cat',), cat_ids=(3,), ann_file=str(ann_file))
    cats = [prediction(i) for i in range(5)]
    for item in cats:
        item.update({key: item[key][:1] for key in ('boxes', 'scores', 'masks')}, labels=torch.tensor([0]))
    assert evaluate(metric, cats)['coco/bbox_mAP_75'] == pytest.approx(1)


@pytest.mark.parametrize('key, value', [('scores', float('nan')), ('boxes', float('inf'))])
def test_values_that_are_not_finite_are_errors(ann_file, key, value):
    bad = prediction(2)
    bad[key][1] = value
    with pytest.raises(ValueError, match=f'^image id 20: {key} hold NaN or infinite'):
        build(ann_file).process(None, [bad])


@pytest.mark.parametrize('change, message', [
    (dict(boxes=torch.tensor([[5., 5, 4, 9]] * 3)), 'image id 0: boxes must be x1 <= x2'),
    (dict(scores=torch.tensor([0.5])), "image id 0: different numbers of .*'scores': 1")])
def test_malformed_predictions_are_errors(ann_file, change, message):
    with pytest.raises(ValueError, match=message):
        build(ann_file).process(None, [prediction(0, **change)])


def test_segm_without_masks_is_an_error(ann_file):
    with pytest.raises(ValueError, match="metric 'segm' needs masks"):
        build(ann_file).process(None, [prediction(0, with_masks=False)])
    runner = Mock(model=types.SimpleNamespace(roi_head=types.SimpleNamespace(mask_head=None)))
    loop = Mock(runner=runner, evaluator=Mock(metrics=[build(ann_file)]))
    with pytest.raises(ValueError, match="metric 'segm' needs masks, but model.roi_head.mask_head=None"):
        check_annotations(loop)


@pytest.mark.parametrize('change, message', [
    (dict(img_id=7), 'image id 7 of the results is not in the annotation file'),
    (dict(labels=torch.tensor([0, 1, 2])), 'labels reach from 0 to 2, but the data set has 2 classes')])
def test_results_of_another_data_set_are_errors(ann_file, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(build(ann_file), [prediction(0, **change)])


def test_annotations_are_checked_before_a_test(tmp_path):
    """Of the images to test alone; a segmentation matters to segm alone."""
    path = write_annotations(tmp_path / 'a.json')
    path.write_text(path.read_text().replace('[[60, 50, 90, 50, 90, 80, 60, 80]]', '[]'))  # a dog of image 0
    build(path).check_annotations([10, 20])
    build(path, metric='bbox').check_annotations([0, 10])
    with pytest.raises(ValueError, match=r'image id 0 with bbox \[60, 50, 30, 30\] has no segmentation'):
        build(path).check_annotations([0, 10])
    path.write_text(path.read_text().replace('[10, 10, 40, 40]', '[10, 10, 40]', 1))
    with pytest.raises(ValueError, match='annotation 1 of image 0 has no valid bbox'):
        build(path, metric='bbox').check_annotations([0, 10])


def test_an_image_with_two_results_is_an_error(ann_file):
    with pytest.raises(ValueError, match='image id 0 has 2 results'):
        evaluate(build(ann_file), [prediction(0), prediction(0)])


def test_an_error_of_evaluation_leaves_the_results_on_disk(tmp_path):
    metric = build(tmp_path / 'absent.json', out=str(tmp_path / 'r.pkl'), outfile_prefix=str(tmp_path / 'r'))
    with pytest.raises(FileNotFoundError, match='no annotation file .*absent.json'):
        evaluate(metric, [prediction(0)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['r.bbox.json', 'r.pkl', 'r.segm.json']
    assert len(pickle.loads((tmp_path / 'r.pkl').read_bytes())) == 1


def test_a_full_disk_leaves_the_numbers(ann_file, tmp_path, monkeypatch, log):
    monkeypatch.setattr(coco_metric, 'write_file', Mock(side_effect=OSError(28, 'No space left on device')))
    with pytest.raises(OSError, match='No space left'):
        evaluate(build(ann_file, out=str(tmp_path / 'r.pkl')), [prediction(i) for i in range(5)])
    said = ('r.pkl was not written: [Errno 28]', 'Evaluation of bbox', 'Evaluation of segm')
    assert all(text in log.getvalue() for text in said)


@pytest.mark.parametrize('arguments, message', [
    (dict(metric='box'), "metric 'box' is not known: choose from bbox, segm"),
    (dict(eval_backend='coco'), "eval_backend 'coco' is not known: choose from hotcoco, pycocotools"),
    (dict(out='r.json'), "out 'r.json' must end with .pkl")])
def test_unknown_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        CocoMetric(**arguments)


def test_a_data_set_without_categories_is_an_error():
    metric = CocoMetric(metric='bbox')
    metric.dataset_meta = dict(classes=CLASSES)
    with pytest.raises(ValueError, match='needs a COCO data set'):
        evaluate(metric, [prediction(0)])


def empty(item):
    return item | {key: item[key][:0] for key in ('boxes', 'scores', 'labels', 'masks')}


@pytest.mark.parametrize('change, said', [
    (empty, '0 detections. Likely cause: an untrained'),
    (lambda p: p | dict(labels=1 - p['labels']),
     '15 detections with scores from 0.000 to 0.900, 8 ground truths matched at IoU >= 0.5 when the class '
     'is ignored. Likely cause: class mix-up'),
    (lambda p: p | dict(labels=1 - p['labels'], boxes=p['boxes'] * (1 if p['img_id'] < 20 else 3)),
     '15 detections with scores from 0.000 to 0.900, 3 ground truths matched at IoU >= 0.5 when the class '
     'is ignored. Likely cause: class mix-up'),
    (lambda p: p | dict(boxes=p['boxes'] * 3),
     '15 detections with scores from 0.000 to 0.900, 0 ground truths matched at IoU >= 0.5 when the class '
     'is ignored. Likely cause: bbox results off')])
def test_zero_ap_comes_with_a_diagnosis(ann_file, change, said, log):
    numbers = evaluate(build(ann_file, metric='bbox'), [change(prediction(i)) for i in range(5)])
    assert numbers['coco/bbox_mAP'] == numbers['coco/bbox_AR@100'] == 0
    assert f'bbox AP is 0: 8 ground truths, {said}' in log.getvalue()


def test_no_ground_truth_is_said(tmp_path, log):
    path = write_annotations(tmp_path / 'gt.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(annotations=[])))
    numbers = evaluate(build(path), [prediction(i) for i in range(5)])
    assert set(numbers.values()) == {-1}
    assert 'segm AP is undefined (-1): no ground truth in the images tested' in log.getvalue()


def test_labels_become_the_category_ids_of_the_data_set():
    item = dict(img_id=3, boxes=np.float32([[1, 2, 4, 8]] * 2), scores=np.float32([0.5, 0.25]),
                labels=np.array([1, 0]), masks=[dict(size=[9, 9], counts=text) for text in (b'Q1', b'1`2')])
    assert to_records([item], [7, 9], 'bbox') == [
        dict(image_id=3, category_id=9, bbox=[1, 2, 3, 6], score=0.5),
        dict(image_id=3, category_id=7, bbox=[1, 2, 3, 6], score=0.25)]
    assert to_records([item], [7, 9], 'segm') == [
        dict(image_id=3, category_id=9, segmentation=dict(size=[9, 9], counts='Q1'), score=0.5),
        dict(image_id=3, category_id=7, segmentation=dict(size=[9, 9], counts='1`2'), score=0.25)]
