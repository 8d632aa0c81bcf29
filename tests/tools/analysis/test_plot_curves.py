"""tools/analysis/plot_curves.py: what it reads from logs and what it writes."""

import json
import os
import runpy
import sys
from pathlib import Path

import cv2
import pytest

TOOL = Path(__file__).parents[3] / 'tools/analysis/plot_curves.py'


def write_log(path, loss=2.0, by_epoch=True):
    """Two epochs of two logged iterations, each followed by an evaluation, whose step is the epoch's or the
    iteration's number."""
    path.parent.mkdir(parents=True)
    lines = []
    for epoch in (1, 2):
        for iteration in (2 * epoch - 1, 2 * epoch):
            counts = dict(epoch=epoch, iter=iteration) if by_epoch else dict(iter=iteration)
            lines.append(dict(lr=0.02, loss=loss / iteration, step=iteration) | counts)
        step = epoch if by_epoch else 2 * epoch
        lines.append({'coco/bbox_mAP': 0.1 * epoch, 'coco/segm_mAP': 0.05 * epoch, 'step': step})
    path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    return path


@pytest.fixture
def tool():
    return runpy.run_path(str(TOOL))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(TOOL), run_name='__main__')
    return status.value.code


def test_curves_are_read_by_iteration_and_epoch(tool, tmp_path):
    curves = tool['read_curves'](write_log(tmp_path / 'a/scalars.json'))
    assert curves['loss'] == ([1, 2, 3, 4], [2, 1, 2 / 3, 0.5])
    assert curves['coco/segm_mAP'] == ([1, 2], [0.05, 0.1])
    assert set(curves) == {'lr', 'loss', 'coco/bbox_mAP', 'coco/segm_mAP'}


def test_a_work_folder_means_its_newest_training(tool, tmp_path):
    logs = [write_log(tmp_path / f'{time}/vis_data/scalars.json') for time in ('0900', '1000')]
    test = tmp_path / '1100/vis_data/scalars.json'
    test.parent.mkdir(parents=True)
    test.write_text('{"coco/bbox_mAP": 0.2, "step": 0}\n')
    for i, log in enumerate([*logs, test]):
        os.utime(log, (i, i))
    assert tool['find_log'](str(tmp_path)) == logs[1]
    assert tool['run_name'](logs[1]) == tmp_path.name


def test_pictures_are_written(tmp_path, monkeypatch, capsys):
    logs = [write_log(tmp_path / name / '0900/vis_data/scalars.json', loss)
            for name, loss in (('a', 2), ('b', 1))]
    assert run(monkeypatch, tmp_path / 'a', '--out', tmp_path / 'new/one.png') == 0
    assert run(monkeypatch, *logs, '--out', tmp_path / 'two.png') == 0
    assert run(monkeypatch, tmp_path / 'a', '--out', tmp_path / 'loss.png', '--keys', 'loss') == 0
    one, two, loss = (cv2.imread(str(tmp_path / name)) for name in ('new/one.png', 'two.png', 'loss.png'))
    assert one.shape == two.shape == (480, 1440, 3) and loss.shape == (480, 720, 3)
    # Curves are the only coloured thing; two trainings have more of them than one.
    coloured = [(picture.max(axis=2) - picture.min(axis=2) > 80).sum() for picture in (loss, one, two)]
    assert 0 < coloured[0] < coloured[1] < coloured[2]
    assert 'two.png' in capsys.readouterr().out


def test_evaluations_are_drawn_over_what_training_counts(tmp_path, monkeypatch):
    epochs, iterations = (write_log(tmp_path / f'{by_epoch}/log.json', by_epoch=by_epoch)
                          for by_epoch in (True, False))
    for logs, labels in [([epochs], (1, 1)), ([iterations], (0, 2)), ([epochs, iterations], (1, 2))]:
        assert run(monkeypatch, *logs, '--out', tmp_path / 'c.svg') == 0
        written = (tmp_path / 'c.svg').read_text()  # each text is in a comment
        assert tuple(written.count(f'<!-- {axis} -->') for axis in ('epoch', 'iteration')) == labels


@pytest.mark.parametrize('arguments, message', [
    (['no.json', '--out', 'c.png'], 'log no.json does not exist'),
    (['text.json', '--out', 'c.png'], 'log text.json does not hold JSON lines'),
    (['list.json', '--out', 'c.png'], 'log list.json has a line without "step"'),
    (['empty', '--out', 'c.png'], 'empty holds no log of a training'),
    (['a', '--out', 'c.png', '--keys', 'los'], 'has no los; it has coco/bbox_mAP, coco/segm_mAP, loss, lr'),
    (['a', '--out', 'c.xyz'], '--out c.xyz is not a picture'),
])
def test_bad_input_is_an_error_of_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_log(Path('a/0900/vis_data/scalars.json'))
    Path('empty').mkdir()
    Path('text.json').write_text('epoch 1\n')
    Path('list.json').write_text('[1]\n')
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and error.count('\n') == 1
    assert not Path('c.png').exists()
