"""tools/eval_results.py gives the numbers of the run that saved the results."""

import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mmdet.evaluation import CocoMetric

TOOL = Path(__file__).parents[2] / 'tools/eval_results.py'
NAMES = ('cat', 'dog')


@pytest.fixture
def saved(tmp_path):
    """The folder of gt.json and r.pkl, and the numbers of the run that wrote r.pkl."""
    rng = np.random.default_rng(0)
    annotations, predictions = [], []
    for i in range(6):
        boxes, masks = [], []
        for label in (0, 1):
            x, y = rng.integers(0, 30, 2).tolist()
            mask = np.zeros((80, 90), np.uint8, order='F')
            mask[y:y + 40, x:x + 40] = 1
            annotations.append(dict(
                id=len(annotations) + 1, image_id=i, category_id=label + 1, bbox=[x, y, 40, 40], area=1600,
                iscrowd=0, segmentation=[[x, y, x + 40, y, x + 40, y + 40, x, y + 40]]))
            boxes.append([x + rng.uniform(0, 9), y, x + 40, y + 40])
            masks.append(coco_mask.encode(np.roll(mask, rng.integers(0, 5), 0)))
        predictions.append(dict(
            img_id=i, img_path=f'{i}.jpg', ori_shape=(80, 90), boxes=np.float32(boxes), masks=masks,
            scores=np.float32(rng.random(2)), labels=np.array([0, 1])))
    (tmp_path / 'gt.json').write_text(json.dumps(dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=80, width=90) for i in range(6)],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(NAMES)], annotations=annotations)))
    metric = CocoMetric(out=str(tmp_path / 'r.pkl'), outfile_prefix=str(tmp_path / 'test'))
    metric.dataset_meta = dict(classes=NAMES, cat_ids=(1, 2), ann_file=str(tmp_path / 'gt.json'))
    metric.process(None, predictions)
    return tmp_path, metric.evaluate(6)


def run(folder, *arguments):
    return subprocess.run([sys.executable, TOOL, *arguments], cwd=folder, capture_output=True, text=True)


def test_numbers_and_files_are_those_of_the_test(saved):
    folder, numbers = saved
    assert 0 < numbers['coco/segm_mAP'] < 1
    done = run(folder, 'r.pkl', '--ann', 'gt.json', '--json-prefix', 'again', '--eval_backend', 'pycocotools')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == numbers
    for kind in ('bbox', 'segm'):
        assert (folder / f'again.{kind}.json').read_bytes() == (folder / f'test.{kind}.json').read_bytes()
    assert '| dog   |       6 |          6 |' in done.stdout


def test_classes_set_the_order_of_the_labels(saved):
    folder, numbers = saved
    swapped = pickle.loads((folder / 'r.pkl').read_bytes())
    for prediction in swapped:
        prediction['labels'] = 1 - prediction['labels']
    (folder / 'swapped.pkl').write_bytes(pickle.dumps(swapped))
    done = run(folder, 'swapped.pkl', '--ann', 'gt.json', '--classes', 'dog', 'cat', '--eval', 'bbox')
    assert json.loads(done.stdout.splitlines()[-1]) == {
        name: value for name, value in numbers.items() if 'bbox' in name}


def test_categories_of_one_name_stay_two(saved, monkeypatch, capsys):
    folder, numbers = saved
    monkeypatch.chdir(folder)
    main = runpy.run_path(str(TOOL))['main']
    content = json.loads((folder / 'gt.json').read_text())
    content['categories'][1]['name'] = 'cat'
    (folder / 'twins.json').write_text(json.dumps(content))
    main(['r.pkl', '--ann', 'twins.json'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == numbers
    with pytest.raises(ValueError, match="class 'cat' is the name of several categories of twins.json"):
        main(['r.pkl', '--ann', 'twins.json', '--classes', 'cat'])


@pytest.mark.parametrize('arguments, message', [
    (['no.pkl', '--ann', 'gt.json'], 'results no.pkl do not exist'),
    (['gt.json', '--ann', 'gt.json'], 'results gt.json cannot be read as a pickle file'),
    (['old.pkl', '--ann', 'gt.json'], 'results old.pkl are not a list of dicts with boxes, img_id'),
    (['r.pkl', '--ann', 'no.json'], 'no.json: configs name it by'),
    (['r.pkl', '--ann', 'gt.json', '--classes', 'cow'], "class 'cow' is not among the categories of gt.json"),
    (['r.pkl', '--ann', 'gt.json', '--classes', 'cat', 'cat'], "--classes names 'cat' twice"),
    (['r.pkl', '--ann', 'gt.json', '--classes', 'cat'], 'labels reach from 0 to 1, but the data set has 1'),
    (['evil.pkl', '--ann', 'gt.json'], 'it holds builtins.print, which could run code'),
    (['boxes.pkl', '--ann', 'gt.json', '--eval', 'segm'], "metric 'segm' needs masks"),
])
def test_bad_input_is_an_error_of_one_line(saved, arguments, message, monkeypatch, capsys):
    folder, _ = saved
    monkeypatch.chdir(folder)
    results = pickle.loads(Path('r.pkl').read_bytes())
    boxes = [{key: value for key, value in result.items() if key != 'masks'} for result in results]
    Path('boxes.pkl').write_bytes(pickle.dumps(boxes))
    Path('evil.pkl').write_bytes(pickle.dumps(print))
    Path('old.pkl').write_bytes(pickle.dumps([([], [])]))
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *arguments])
    with pytest.raises(SystemExit, match='^1$'):
        runpy.run_path(str(TOOL), run_name='__main__')
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and error.count('\n') == 1
