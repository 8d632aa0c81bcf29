"""When the log gets a line, and what the evaluations of a training are counted by in it."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmdet.engine.hooks.logger_hook import LoggerHook


@pytest.mark.parametrize('train_cfg, steps', [
    (dict(type='IterBasedTrainLoop', max_iters=5, val_interval=2), [2, 4, 5]),
    (dict(type='EpochBasedTrainLoop', max_epochs=2), [1, 2])])
def test_evaluations_are_logged_by_what_training_counts(toy_runner, train_cfg: dict, steps: list) -> None:
    runner = toy_runner(train_cfg=dict(train_cfg, _delete_=True))
    runner.train()
    log = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line['step'] for line in lines if 'toy/mean' in line] == steps
    by_epoch = train_cfg['type'] == 'EpochBasedTrainLoop'
    assert {'epoch' in line for line in lines if 'loss' in line} == {by_epoch}


def test_a_line_at_least_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, 'monotonic', lambda: clock.now)
    hook = LoggerHook(seconds=20)
    # Iterations 3 and 7 have theirs anyway, from which the seconds count anew.
    times = [119.9, 120, 130, 135, 154, 155, 156, 157]
    due = [hook.every_n_inner_iters(i, 4) for i, clock.now in enumerate(times)]
    assert due == [False, True, False, True, False, True, False, True]
