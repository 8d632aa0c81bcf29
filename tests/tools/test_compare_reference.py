import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compare_reference as tool
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mmdet.engine.launch import run_tool

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ROOT / 'configs' / 'gcnet' / 'mask_rcnn_r50_fpn_1x.py'
GCB = ROOT / 'configs' / 'gcnet' / 'mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command's exit code."""
    def exit_code(*words: object) -> int:
        monkeypatch.setattr(sys, 'argv', [tool.__file__, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main)
        return end.value.code or 0
    return exit_code


@pytest.mark.shared('reference')
@pytest.mark.parametrize('config, reference', [
    (PLAIN, 'plain_r50_f32'), (GCB, 'gcb_r4_r50_f64'),
    pytest.param(PLAIN, 'plain_r50_f64', marks=pytest.mark.slow),
    pytest.param(GCB, 'gcb_r4_r50_f32', marks=pytest.mark.slow)], ids=lambda value: Path(value).stem)
def test_everything_agrees_with_mmdetection(config: Path, reference: str, shared_dir: Path) -> None:
    # In a process of its own: rounding is settled by the first call of MKL.
    done = subprocess.run(
        [sys.executable, tool.__file__, config, shared_dir / 'reference' / f'{reference}.json'],
        text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Maps, heads, detections, losses and gradients: none may be left out.
    assert done.stdout.count('| ok ') > 45 and 'comparisons agree' in done.stdout.splitlines()[-1]


@pytest.fixture
def small_reference(shared_dir: Path, tmp_path: Path) -> Path:
    """The plain reference with images of a quarter: quick, but for numbers that depend on the images."""
    folder = shared_dir / 'reference'
    for name in ('fill.py', 'plain_r50_f32.json', 'plain_r50_f32.npz'):
        shutil.copy(folder / name, tmp_path / name)
    arrays = dict(np.load(folder / 'inputs.npz'))
    for i in range(2):
        height, width = (side // 4 for side in arrays[f'img_{i}'].shape[:2])
        masks = np.unpackbits(arrays[f'masks_packed_{i}'])[:arrays[f'masks_shape_{i}'].prod()]
        masks = masks.reshape(arrays[f'masks_shape_{i}'])[:, :height, :width]
        arrays |= {f'img_{i}': arrays[f'img_{i}'][:height, :width], f'masks_packed_{i}': np.packbits(masks),
                   f'masks_shape_{i}': np.array(masks.shape)}
    np.savez(tmp_path / 'inputs.npz', **arrays)
    return tmp_path / 'plain_r50_f32.json'


@pytest.mark.shared('reference')
def test_another_setting_fails(
        run: Callable, shared_dir: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tool, 'compare_training', lambda *args: None)  # which takes most of the time
    options = ['model.test_cfg.rpn.nms.iou_threshold=0.6']
    assert run(PLAIN, shared_dir / 'reference' / 'plain_r50_f32.json', '--cfg-options', *options) == 1
    out = capsys.readouterr().out
    assert '| DIFFERS |' in out and '| ok      |' in out
    last = out.strip().splitlines()[-1]
    assert 'comparisons differ' in last and 'proposals of image 0: boxes' in last and 'backbone' not in last


@pytest.mark.slow
@pytest.mark.shared('reference')
def test_other_training_settings_fail(
        run: Callable, shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ['model.backbone.frozen_stages=2', 'model.train_cfg.rpn.assigner.pos_iou_thr=0.6']
    assert run(PLAIN, shared_dir / 'reference' / 'plain_r50_f32.json', '--cfg-options', *options) == 1
    out = capsys.readouterr().out
    assert '| DIFFERS |' in out and '| ok      |' in out
    last = out.strip().splitlines()[-1]
    assert 'comparisons differ' in last and 'names of frozen parameters' in last and 'loss_rpn_cls' in last
    assert 'loss_mask' not in last and 'proposals' not in last


@pytest.mark.shared('reference')
def test_other_images_are_another_reference(
        run: Callable, small_reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PLAIN, small_reference) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: a tensor has the shape [2, 3, ') and error.count('\n') == 1
    assert 'is the reference of another config?' in error


@pytest.mark.shared('reference')
def test_wrong_config(run: Callable, shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r18 = ROOT / 'configs' / 'quickstart' / 'mask_rcnn_r4_gcb_c3-c5_r18_fpn_synthetic.py'
    assert run(r18, shared_dir / 'reference' / 'plain_r50_f32.json') == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and 'another config' in error


@pytest.mark.shared('reference')
def test_missing_and_wrong_files(
        run: Callable, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / 'other.json'
    other.write_text(json.dumps(dict(a=1)))
    broken = tmp_path / 'broken.json'
    broken.write_text('{"a": ')
    reference = shared_dir / 'reference' / 'plain_r50_f32.json'
    for config, recorded, part in (
            (PLAIN, tmp_path / 'none.json', 'none.json'), (PLAIN, tmp_path, str(tmp_path)),
            (PLAIN, other, 'other.json: not a reference file'),
            (PLAIN, broken, 'broken.json: not a JSON file'),
            (tmp_path / 'none.py', reference, 'none.py: no such config file')):
        assert run(config, recorded) == 1
        error = capsys.readouterr().err
        assert error.startswith('error: ') and part in error and error.count('\n') == 1


def test_a_nan_is_a_difference() -> None:
    found = tool.Comparison()
    found.add('a', float('nan'), 1.0)
    found.add('b', 1.0, 1.0)
    assert found.failed == ['a']


def test_one_pixel_of_a_mask_may_fall_either_way() -> None:
    masks = np.zeros((6, 8, 3), np.uint8)
    masks[1:4, 1:4] = 1
    masks[1, 1, 1] = 0
    masks[1, 1:3, 2] = 0
    whole, one, two = coco_mask.encode(np.asfortranarray(masks))
    assert tool.mask_iou(one, whole['counts'].decode()) == 1
    assert tool.mask_iou(two, whole['counts'].decode()) == pytest.approx(7 / 9)


def test_only_an_overlapping_box_of_the_same_score_excuses_a_proposal() -> None:
    found = tool.Proposals(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0.9]))
    boxes = np.array([[0, 0, 10, 8], [0, 0, 10, 6], [0, 0, 10, 8]], np.float32)  # overlaps 0.8, 0.6, 0.8
    scores = np.array([0.9, 0.9, 0.89], np.float32)
    assert tool.exchanged(found, boxes, scores, 0.7).tolist() == [True, False, False]


def test_the_worst_error() -> None:
    assert tool.worst_of('norms', dict(a=1.0, b=3.0, c=2.0)) == ('norms (worst: b)', 3.0)
    what, error = tool.worst_of('norms', dict(a=1.0, b=float('nan'), c=2.0))
    assert what == 'norms (worst: b)' and np.isnan(error)


def test_running_statistics_are_sum_norm_and_first_values() -> None:
    buffer = torch.tensor([3.0, 4.0])
    assert tool.buffer_error(buffer, [7.0, 5.0, 3.0, 4.0]) == 0
    assert tool.buffer_error(buffer, [7.0, 5.0, 3.0, 4.5]) == pytest.approx(0.1)


SMOOTH_L1 = ['SmoothL1 in bbox_head', 'SmoothL1 in rpn_head']
SAMPLING = ['sampling_ratio=2 in bbox_roi_extractor', 'sampling_ratio=2 in mask_roi_extractor']


@pytest.mark.parametrize('recorded, changed', [
    (dict(edits=[]), []),
    (dict(), []),
    (dict(edits=['SyncBN -> BN', 'train_cfg.rcnn.sampler.num=1e6']), []),
    (dict(model='gcb_r4_r50_legacy', edits=[]), SMOOTH_L1 + SAMPLING),
    (dict(edits=['losses: SmoothL1 beta 1/9 and 1', 'RoIAlign sampling 2']), SMOOTH_L1 + SAMPLING),
    (dict(edits='SmoothL1 in the RPN; sampling_ratio 2'), SMOOTH_L1[1:] + SAMPLING),
    (dict(edits=[['rpn_head.loss_bbox', dict(type='SmoothL1Loss', beta=1 / 9)]]), SMOOTH_L1[1:]),
    (dict(edits={'roi_head.bbox_head.loss_bbox': dict(type='SmoothL1Loss', beta=1.0)}), SMOOTH_L1[:1]),
    (dict(edits={'roi_head.mask_roi_extractor.roi_layer.sampling_ratio': 2}), SAMPLING[1:])])
def test_edits_of_a_reference(recorded: dict, changed: list[str]) -> None:
    cfg = tool.load_config(PLAIN)
    assert tool.apply_edits(cfg, recorded) == changed
    model = cfg.model
    assert model.rpn_head.loss_bbox.get('beta') == (1 / 9 if 'SmoothL1 in rpn_head' in changed else None)
    box_beta = 1 if 'SmoothL1 in bbox_head' in changed else None
    assert model.roi_head.bbox_head.loss_bbox.get('beta') == box_beta
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        assert model.roi_head[name].roi_layer.sampling_ratio == 2 * (f'sampling_ratio=2 in {name}' in changed)


def test_edits_reach_every_stage_of_a_cascade() -> None:
    cfg = tool.load_config(ROOT / 'configs' / 'gcnet' / 'cascade_mask_rcnn_x101_32x4d_fpn_syncbn_1x.py')
    for head in cfg.model.roi_head.bbox_head:
        head.loss_bbox = dict(type='L1Loss')
    tool.apply_edits(cfg, dict(edits=['SmoothL1']))
    assert [head.loss_bbox.type for head in cfg.model.roi_head.bbox_head] == ['SmoothL1Loss'] * 3


def test_what_is_not_recorded_is_named() -> None:
    found = tool.Comparison()
    recorded = dict(a=1.0, b=[], c={}, d=None, e=[0])
    assert [found.has(recorded, key) for key in 'abcdef'] == [True, False, False, False, True, False]
    assert not found.has({}, 'rle', 'masks of image 1')
    assert found.absent == ['b', 'c', 'd', 'f', 'masks of image 1'] and found.rows == []


def test_stages_of_heads() -> None:
    stage = dict(cls_score=1)
    assert tool.stages_of([stage, stage]) == tool.stages_of({'0': stage, '1': stage}) == [stage, stage]
    assert tool.stages_of(stage) == [stage]


def test_running_statistics_of_other_forms() -> None:
    buffer = torch.arange(8.0)
    every = buffer.tolist()
    assert tool.buffer_error(buffer, every) == 0 and tool.buffer_error(torch.tensor(3), 3) == 0
    assert tool.buffer_error(buffer, [*every[:7], 8.0]) == pytest.approx(1 / 140 ** 0.5)
    assert tool.buffer_error(buffer, [[8], 28.0, 0.0]) == 0
    assert tool.buffer_error(buffer, [[8], 28.0, 1.0]) == pytest.approx(1 / 140 ** 0.5)
    assert tool.buffer_error(buffer, [[7], 28.0, 0.0]) == float('inf')


@pytest.mark.parametrize('recorded', [{}, dict(bn_after={})])
def test_batch_statistics_that_are_not_recorded(recorded: dict) -> None:
    norm, found = torch.nn.BatchNorm2d(3), tool.Comparison()
    tool.compare_statistics(norm, recorded, found)
    assert found.absent == ['bn_after']
    found = tool.Comparison()
    tool.compare_statistics(norm.eval(), recorded, found)
    assert found.absent == found.rows == []


def test_statistics_of_unknown_names_differ() -> None:
    found = tool.Comparison()
    tool.compare_statistics(torch.nn.BatchNorm2d(3), dict(bn_after={'bn1.running_mean': [0.0] * 3}), found)
    assert found.failed == ['names of running statistics']


def test_the_command_says_what_was_not_compared(
        run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    def compare(*args: object) -> object:
        found = tool.Comparison()
        found.add('neck[0]', 0.0, 1e-5)
        found.has({}, 'detections')
        return found
    monkeypatch.setattr(tool, 'compare', compare)
    assert run(PLAIN, tmp_path / 'a.json') == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        'not recorded, so not compared: detections', 'all 1 comparisons agree']
    monkeypatch.setattr(tool, 'compare', lambda *args: tool.Comparison())
    assert run(PLAIN, tmp_path / 'a.json') == 1
    assert 'records nothing that could be compared' in capsys.readouterr().err
