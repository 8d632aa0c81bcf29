"""CocoDataset against pycocotools, and every kind of bad input."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from pycocotools.coco import COCO

from mmdet.datasets import coco
from mmdet.datasets.coco import COCO_CLASSES, CocoDataset
from mmdet.registry import DATASETS


def change_json(path: str, change: Callable[[dict], None]) -> None:
    content = json.loads(Path(path, 'ann.json').read_text())
    change(content)
    Path(path, 'ann.json').write_text(json.dumps(content))


@pytest.mark.shared('coco128')
@pytest.mark.parametrize('split', ['train2017', 'val2017'])
def test_equals_pycocotools(shared_dir, split):
    ann_file = shared_dir / f'coco128/annotations/instances_{split}.json'
    folder = str(shared_dir / 'coco128' / split)
    dataset = CocoDataset(str(ann_file), data_prefix=dict(img=folder), test_mode=True)
    reference = COCO(str(ann_file))
    cat_ids = reference.getCatIds()
    assert dataset.metainfo['cat_ids'] == cat_ids
    assert [c['name'] for c in reference.loadCats(cat_ids)] == list(dataset.metainfo['classes'])
    assert dataset.metainfo['ann_file'] == str(ann_file.absolute())
    assert [dataset.get_data_info(i)['img_id'] for i in range(len(dataset))] == reference.getImgIds()
    crowds = 0
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        expected = reference.loadAnns(reference.getAnnIds(imgIds=[info['img_id']]))
        assert Path(info['img_path']).is_file()
        assert [cat_ids[o['bbox_label']] for o in info['instances']] == [a['category_id'] for a in expected]
        assert [o['ignore_flag'] for o in info['instances']] == [a['iscrowd'] for a in expected]
        masks = [[p.tolist() for p in mask] if isinstance(mask, list) else mask
                 for mask in (o['mask'] for o in info['instances'])]
        assert masks == [a['segmentation'] for a in expected]
        boxes = np.array([a['bbox'] for a in expected]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(np.array([o['bbox'] for o in info['instances']]).reshape(-1, 4), boxes)
        crowds += sum(o['ignore_flag'] for o in info['instances'])
    assert crowds == len(reference.getAnnIds(iscrowd=True))


@pytest.mark.shared('coco128')
def test_classes_choose_and_order_labels(shared_dir):
    ann_file = str(shared_dir / 'coco128/annotations/instances_train2017.json')
    prefix = dict(img=str(shared_dir / 'coco128/train2017'))
    dataset = CocoDataset(ann_file, dict(classes=['dog', 'person']), data_prefix=prefix,
                          filter_cfg=dict(filter_empty_gt=True))
    reference = COCO(ann_file)
    dogs, people = reference.getCatIds(['dog'])[0], reference.getCatIds(['person'])[0]
    assert dataset.metainfo['cat_ids'] == [dogs, people]
    assert len(dataset) == len(set(reference.catToImgs[dogs]) | set(reference.catToImgs[people]))
    labels = [o['bbox_label'] for i in range(len(dataset)) for o in dataset.get_data_info(i)['instances']]
    assert labels.count(0) == len(reference.catToImgs[dogs])
    assert labels.count(1) == len(reference.catToImgs[people])
    assert len(dataset.metainfo['palette']) == 2


def test_default_classes():
    dataset = CocoDataset('none.json', lazy_init=True)
    assert dataset.metainfo['classes'] == COCO_CLASSES and len(set(COCO_CLASSES)) == 80
    assert len(set(dataset.metainfo['palette'])) == 80


def test_unusable_annotations_are_left_out_and_counted(make_coco, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(coco, 'print_log', lambda line, logger: lines.append(line))
    args = make_coco([
        dict(bbox=[5, 5, 0, 9]),
        dict(bbox=[5, 5, 9, .5]),
        dict(area=0),
        dict(bbox=[50, 5, 9, 9]),
        dict(bbox=[5, -9, 9, 9]),
        dict(bbox=[50 - 1e-4, 5, 9, 9]),
        dict(ignore=1),
        dict(category_id=9),
        dict(bbox=[49.5, 35, 20, 20]),
        dict(iscrowd=1)])
    args['metainfo'] = dict(classes=['dog', 'cat'])
    info = CocoDataset(**args).get_data_info(0)
    assert [(o['bbox'], o['bbox_label'], o['ignore_flag']) for o in info['instances']] == [
        ([49.5, 35, 69.5, 55], 1, 0), ([2, 3, 12, 11], 1, 1)]
    assert len(lines) == 1 and lines[0].endswith(
        "3 images, 1 objects, 1 crowd regions; annotations left out: 1 marked 'ignore', "
        '1 of other categories, 3 of zero area or below 1 pixel, 3 outside the image')


def test_filter(make_coco):
    sizes = [(40, 50), (40, 50), (40, 50), (31, 50), (40, 50)]
    # 0: object, 1: crowd only, 2: another class, 3: too small, 4: nothing
    annotations = [{}, dict(image_id=1, iscrowd=1), dict(image_id=2, category_id=9), dict(image_id=3)]
    args = make_coco(annotations, sizes)
    args['metainfo'] = dict(classes=['cat'])

    def kept(**changes: Any) -> list[int]:
        dataset = CocoDataset(**args | changes)
        return [dataset.get_data_info(i)['img_id'] for i in range(len(dataset))]

    both = dict(filter_empty_gt=True, min_size=32)
    assert kept(filter_cfg=both) == [0, 1]
    assert kept(filter_cfg=dict(filter_empty_gt=False, min_size=32)) == [0, 1, 2, 4]
    assert kept(filter_cfg=dict(filter_empty_gt=True)) == [0, 1, 3]
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(filter_cfg=both, test_mode=True) == [0, 1, 2, 3, 4]
    assert kept(indices=2) == [0, 1] and kept(indices=[4, 0]) == [4, 0]
    assert kept(filter_cfg=both, serialize_data=False) == [0, 1]


@pytest.mark.parametrize('changes', [
    dict(bbox=[0.1, 0.1, 0.5, 0.5], area=0.25), dict(area=0), dict(iscrowd=1)])
def test_annotations_without_an_object_are_nothing_to_train_on(make_coco, changes):
    args = make_coco([changes, dict(image_id=1) | changes])
    with pytest.raises(ValueError, match='ann.json: no object to train on is left in 2 images'):
        CocoDataset(**args, filter_cfg=dict(filter_empty_gt=True))
    assert len(CocoDataset(**args)) == len(CocoDataset(**args, test_mode=True)) == 3


def test_a_crowd_needs_no_segmentation(make_coco):
    args = make_coco([{}, dict(iscrowd=1, segmentation=None)])
    dataset = CocoDataset(**args, pipeline=[dict(type='LoadAnnotations', with_mask=True)])
    assert [('mask' in o, o['ignore_flag']) for o in dataset.get_data_info(0)['instances']] == [
        (True, 0), (False, 1)]


def test_positions_outside_the_data_set_are_an_error(make_coco):
    with pytest.raises(ValueError, match='ann.json: indices has 99, but there are 3 images'):
        CocoDataset(**make_coco([{}]), indices=[0, 99])


def test_random_draws_follow_seed_epoch_and_index(make_coco):
    dataset = CocoDataset(**make_coco([dict(image_id=i) for i in range(3)]),
                          pipeline=[lambda results: results['rng'].random()])

    def draws(seed: int, epoch: int) -> list[float]:
        dataset.set_seed(seed)
        dataset.set_epoch(epoch)
        return [dataset[i] for i in (2, 0, 1)][1:] + [dataset[-1]]

    assert draws(1, 2) == draws(1, 2) == [np.random.default_rng((1, 2, i)).random() for i in range(3)]
    assert len({*draws(1, 2), *draws(1, 3), *draws(2, 2)}) == 9


@pytest.mark.parametrize('change, message', [
    (lambda c: c.pop('categories'), "no list 'categories'"),
    (lambda c: c['annotations'][0].update(category_id=80), '1 has a category_id that is not in the file: 80'),
    (lambda c: c['annotations'][0].update(image_id=80), '1 has an image_id that is not in the file: 80'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, float('nan'), 4]), 'annotation 1 has a bbox or area'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, float('inf'), 4]), 'annotation 1 has a bbox or area'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, 3]), 'bbox \\(4 numbers\\)'),
    (lambda c: c['annotations'][0].update(bbox=['1', '2', '3', '4']), 'bbox \\(4 numbers\\)'),
    (lambda c: c['annotations'][0].update(bbox=None), 'bbox \\(4 numbers\\)'),
    (lambda c: c['annotations'][0].pop('image_id'), 'image_id, category_id, bbox'),
    (lambda c: c['annotations'].append('text'), 'an annotation needs'),
    (lambda c: c['annotations'][1].update(id=1), 'annotation id 1 is not unique'),
    (lambda c: c['annotations'][0].pop('segmentation'), 'annotation 1 has no segmentation'),
    (lambda c: c['annotations'][0].update(segmentation=dict(size=[50, 40], counts=[2000])), 'has no RLE of'),
    (lambda c: c['annotations'][0].update(segmentation=dict(size=[40, 50], counts=[1])), 'an RLE whose'),
    (lambda c: c['annotations'][0].update(segmentation=[[1, 2, float('nan'), 4, 5, 6]]), '1 has a polygon'),
    (lambda c: c['annotations'][0].update(segmentation=[[1, 2, 3, 1e12, 5, 6]]), 'beyond 100000 pixels'),
    (lambda c: c['annotations'][0].update(iscrowd='no'), "1 has an iscrowd that is neither 0 nor 1: 'no'"),
    (lambda c: c['annotations'][0].update(segmentation=[2, 3, 12, 3, 12, 11]), 'neither a list of poly'),
    (lambda c: c['annotations'][0].update(segmentation=[[2, 3, None, 3, 12, 11]]), 'nor an RLE: .*None'),
    (lambda c: c['annotations'][0].update(segmentation='2 3 12 3'), 'neither a list of polygons'),
    (lambda c: c['images'][1].update(id=0), 'image id 0 is not unique'),
    (lambda c: c['images'][1].update(id=-7), "an image needs an integer id from 0 on, .*'id': -7"),
    (lambda c: c['images'][1].pop('width'), 'an image needs .* width'),
    (lambda c: c['images'][1].update(file_name=None), 'an image needs .* file_name'),
    (lambda c: c['images'].clear(), 'image_id that is not in the file'),
    (lambda c: c['categories'][1].update(id=3), 'ids or names of categories are not unique'),
    (lambda c: c['categories'][1].update(name='cat'), 'ids or names of categories are not unique'),
    (lambda c: c['categories'][0].pop('name'), 'a category needs a name'),
    (lambda c: c['categories'][0].update(id='3'), 'a category needs a name and a whole number'),
    (lambda c: c.update(images=[], annotations=[]), 'none of 0 images is left'),
    (lambda c: c.update(annotations=[]), 'none of 3 images is left: 3 without annotations of its classes'),
    (lambda c: [i.update(height=20) for i in c['images']], '2 without annotations of .*, 1 below min_size'),
])  # fmt: skip
def test_malformed_file_is_one_clear_error(make_coco, tmp_path, change, message):
    args = make_coco([{}, {}])
    change_json(args['data_root'], change)
    with pytest.raises(ValueError, match=message) as error:
        CocoDataset(**args, filter_cfg=dict(filter_empty_gt=True, min_size=32),
                    pipeline=[dict(type='LoadAnnotations', with_mask=True)])
    assert str(tmp_path / 'ann.json') in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('content', [b'', b'{"images": [', b'\xff\xfe\x00', b'[1, 2]', b'3'])
def test_not_an_annotation_file(tmp_path, content):
    (tmp_path / 'ann.json').write_bytes(content)
    with pytest.raises(ValueError, match='ann.json is not a') as error:
        CocoDataset(str(tmp_path / 'ann.json'))
    assert '\n' not in str(error.value)


def test_wrong_class_names_show_both_sets_and_the_nearest(make_coco):
    args = make_coco([{}])
    with pytest.raises(ValueError) as error:
        CocoDataset(**args | dict(metainfo=dict(classes=('cat', 'traffic_light'))))
    message = str(error.value)
    assert "no category ['traffic_light']; nearest: 'traffic_light' -> 'traffic light'" in message
    assert "config: ['cat', 'traffic_light']" in message
    assert "file: ['cat', 'dog', 'traffic light']" in message
    # COCO's classes, the default, with the file of another data set
    with pytest.raises(ValueError) as error:
        CocoDataset(**args | dict(metainfo=None))
    message = str(error.value)
    assert '78 in all' not in message and "'bicycle', " in message and '... 80 in all]' in message
    assert "file: ['cat', 'dog', 'traffic light']" in message and '\n' not in message and len(message) < 1000


@pytest.mark.parametrize('changes, message', [
    (dict(metainfo=dict(classes='cat')), 'must be a list of names'),
    (dict(metainfo=dict(classes=[])), 'empty or names a class twice'),
    (dict(metainfo=dict(classes=['cat', 'cat'])), 'empty or names a class twice'),
    (dict(metainfo=dict(CLASSES=['cat'])), "metainfo has the unknown key 'CLASSES'"),
    (dict(filter_cfg=dict(filter_empty=True)), "filter_cfg has the unknown key 'filter_empty'"),
    (dict(data_prefix=dict(img_path='img')), "data_prefix has the unknown key 'img_path'"),
    (dict(indices=0), 'indices=0 leaves no image'),
])  # fmt: skip
def test_wrong_arguments(make_coco, changes, message):
    with pytest.raises(ValueError, match=message):
        CocoDataset(**make_coco([{}]) | changes)


def test_a_test_set_has_no_annotations(make_coco, tmp_path):
    args = make_coco([{}])
    change_json(tmp_path, lambda content: content.pop('annotations'))
    dataset = CocoDataset(**args, test_mode=True)
    assert [dataset.get_data_info(i)['instances'] for i in range(len(dataset))] == [[], [], []]
    with pytest.raises(ValueError, match="ann.json is not .*: no list 'annotations' in it"):
        CocoDataset(**args)


def test_concatenation_of_annotation_files(make_coco, tmp_path):
    args = make_coco([{}, {}])
    content = json.loads((tmp_path / 'ann.json').read_text())
    (tmp_path / 'second.json').write_text(json.dumps(content | dict(images=content['images'][:1])))
    parts = [dict(args, type='CocoDataset', ann_file=name) for name in ('ann.json', 'second.json')]
    whole = dict(type='ConcatDataset', datasets=parts, ignore_keys='palette')
    with DefaultScope.overwrite_default_scope('mmdet'):  # as in a training
        dataset = DATASETS.build(whole)
        assert len(dataset) == 4 and dataset.metainfo['classes'] == args['metainfo']['classes']
        assert dataset[3]['img_id'] == 0 and len(dataset[3]['instances']) == 2
        parts[1]['metainfo'] = dict(classes=('dog', 'cat', 'traffic light'))
        with pytest.raises(ValueError, match='does not match meta information of the first'):
            DATASETS.build(whole)
        for part in parts:
            part.update(args, ann_file=part['ann_file'], test_mode=True)
        with pytest.raises(ValueError, match='a test is of one annotation file, not of .*ann.json, .*second'):
            DATASETS.build(whole)


def test_missing_files(make_coco, tmp_path):
    args = make_coco([{}])
    with pytest.raises(FileNotFoundError, match=f'no annotation file {tmp_path}/other.json'):
        CocoDataset(**args | dict(ann_file='other.json'))
    with pytest.raises(FileNotFoundError, match=f'no image folder {tmp_path}/images'):
        CocoDataset(**args | dict(data_prefix=dict(img='images')))
    (tmp_path / 'img/1.png').unlink()
    (tmp_path / 'img/2.png').unlink()
    with pytest.raises(FileNotFoundError, match=f'2 of 3 images of .* do not exist.* {tmp_path}/img/1.png'):
        CocoDataset(**args)
    assert len(CocoDataset(**args, indices=1)) == 1  # only what is used has to be there
