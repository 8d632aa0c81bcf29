import json
import logging
import os
import subprocess
import sys
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmdet.checkpoint import load_file, save_checkpoint
from mmdet.engine.runner import DetectionRunner

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # as its processes have it

from toy import ToyDataset, ToyModel  # noqa: E402


def assert_same(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    for name, value in first['state_dict'].items():
        assert torch.equal(value, second['state_dict'][name]), name
    for index, state in first['optimizer']['state'].items():
        assert torch.equal(state['momentum_buffer'], second['optimizer']['state'][index]['momentum_buffer'])
    assert first['optimizer']['param_groups'] == second['optimizer']['param_groups']


def test_two_and_two_epochs_are_four(toy_runner, tmp_path: Path) -> None:
    toy_runner('four', val_cfg=None, val_dataloader=None, val_evaluator=None).train()
    toy_runner('two', train_cfg__max_epochs=2).train()  # with evaluation, which draws nothing that matters
    toy_runner(
        'rest',
        load_from=str(tmp_path / 'two' / 'epoch_2.pth'),
        resume=True,
        train_dataloader__num_workers=1,
        train_dataloader__persistent_workers=True,
    ).train()
    assert_same(tmp_path / 'four' / 'epoch_4.pth', tmp_path / 'rest' / 'epoch_4.pth')


def test_an_accumulation_goes_on_over_the_end_of_an_epoch(toy_runner, tmp_path: Path) -> None:
    """Six iterations an epoch, four a step: two wait when the second run begins."""
    options = dict(optim_wrapper__accumulative_counts=4, train_cfg__val_interval=9)
    toy_runner('four', **options).train()
    toy_runner('one', train_cfg__max_epochs=3, **options).train()
    start = tmp_path / 'one' / 'epoch_1.pth'
    assert load_file(start)['gradients'].keys() == dict(ToyModel().named_parameters()).keys()
    toy_runner('rest', load_from=str(start), resume=True, **options).train()
    assert_same(tmp_path / 'four' / 'epoch_4.pth', tmp_path / 'rest' / 'epoch_4.pth')
    lost = 'does not hold the gradients that waited'
    assert lost not in Path(glob(f'{tmp_path}/rest/*/*.log')[0]).read_text()
    older = load_file(start)
    del older['gradients']
    save_checkpoint(older, tmp_path / 'older.pth')
    toy_runner('lost', load_from=str(tmp_path / 'older.pth'), resume=True, **options).train()
    assert lost in Path(glob(f'{tmp_path}/lost/*/*.log')[0]).read_text()
    # Where two make a step, six are at its end, and what waited for four is left.
    for name, path in (('with', start), ('without', tmp_path / 'older.pth')):
        two = options | dict(optim_wrapper__accumulative_counts=2)
        toy_runner(name, load_from=str(path), resume=True, **two).train()
    assert_same(tmp_path / 'with' / 'epoch_4.pth', tmp_path / 'without' / 'epoch_4.pth')


def test_waiting_gradients_are_saved_without_the_scale_of_the_losses(
        toy_runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(train_cfg__max_epochs=2, optim_wrapper__accumulative_counts=4)
    runner = toy_runner(**options)
    runner.optim_wrapper = SimpleNamespace(loss_scaler=torch.amp.GradScaler('cpu', init_scale=8))
    assert runner._loss_scale == 8
    for scale in (1.0, 8.0):
        monkeypatch.setattr(DetectionRunner, '_loss_scale', scale)
        toy_runner(str(scale), **options).train()
        start = tmp_path / str(scale) / 'epoch_1.pth'
        toy_runner(f'rest{scale}', load_from=str(start), resume=True, **options).train()
    plain, scaled = (load_file(tmp_path / name / 'epoch_1.pth')['gradients'] for name in ('1.0', '8.0'))
    assert plain and all(torch.equal(gradient, scaled[name] * 8) for name, gradient in plain.items())
    assert_same(tmp_path / '1.0' / 'epoch_2.pth', tmp_path / 'rest8.0' / 'epoch_2.pth')


def test_waiting_gradients_do_not_move_what_is_frozen(toy_runner, tmp_path: Path) -> None:
    options = dict(train_cfg__max_epochs=2, optim_wrapper__accumulative_counts=4)
    toy_runner('two', **options).train()
    start = tmp_path / 'two' / 'epoch_1.pth'
    rest = toy_runner('rest', load_from=str(start), resume=True, **options)
    rest.bare_model.conv.requires_grad_(False)
    rest.train()
    before, after = load_file(start)['state_dict'], rest.bare_model.state_dict()
    assert torch.equal(after['conv.weight'], before['conv.weight'])
    assert not torch.equal(after['fc.weight'], before['fc.weight'])


def test_an_average_of_the_weights_is_what_is_saved_and_resumed(toy_runner, tmp_path: Path) -> None:
    average = [dict(type='EMAHook', momentum=0.5)]
    toy_runner('plain').train()
    four = toy_runner('four', custom_hooks=average)
    four.train()
    toy_runner('two', custom_hooks=average, train_cfg__max_epochs=2).train()
    start = str(tmp_path / 'two' / 'epoch_2.pth')
    toy_runner('rest', custom_hooks=average, load_from=start, resume=True).train()
    assert_same(tmp_path / 'four' / 'epoch_4.pth', tmp_path / 'rest' / 'epoch_4.pth')
    plain, saved = (load_file(tmp_path / name / 'epoch_4.pth') for name in ('plain', 'four'))
    trained = four.bare_model.state_dict()
    for name, value in plain['state_dict'].items():
        assert torch.equal(trained[name], value)
    assert not torch.equal(saved['state_dict']['fc.weight'], plain['state_dict']['fc.weight'])


def test_accumulated_gradients_are_those_of_a_larger_batch(
        toy_runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, 'rand', lambda *shape: torch.zeros(*shape))  # keep every element of the loss
    found = []
    for name, batch, count in (('one', 4, 1), ('two', 2, 2)):
        runner = toy_runner(name, train_cfg__max_epochs=1, train_dataloader__batch_size=batch,
                            optim_wrapper__accumulative_counts=count, param_scheduler=None)
        runner.bare_model.bn = torch.nn.Identity()
        runner.train()
        assert runner.total_batch == 4
        found.append(runner.bare_model.fc.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_backbone_and_neck_are_compiled_under_their_names(toy_runner) -> None:
    runner = toy_runner('c')
    model, x = runner.bare_model, torch.randn(1, 3, 4, 4)
    model.backbone, model.neck = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)
    names, expected = list(model.state_dict()), model.backbone(x)
    runner._maybe_compile('train_step')
    assert model.backbone._compiled_call_impl is None
    runner.cfg.compile = dict(backend='eager')
    runner._maybe_compile('train_step')
    assert None not in (model.backbone._compiled_call_impl, model.neck._compiled_call_impl)
    assert list(model.state_dict()) == names and torch.equal(model.backbone(x), expected)


def test_another_seed_is_another_training(toy_runner, tmp_path: Path) -> None:
    toy_runner('a', train_cfg__max_epochs=1).train()
    toy_runner('b', train_cfg__max_epochs=1, randomness=dict(seed=4)).train()
    a, b = (load_file(tmp_path / name / 'epoch_1.pth')['state_dict']['fc.weight'] for name in 'ab')
    assert not torch.equal(a, b)


def test_two_and_two_epochs_are_four_on_two_processes(tmp_path: Path) -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(HERE / 'toy_distributed.py'),
            str(tmp_path),
        ],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / 'four' / 'epoch_4.pth', tmp_path / 'rest' / 'epoch_4.pth')
    whole, resumed = (
        load_file(tmp_path / name / 'epoch_4.pth')['state_dict'] for name in ('accumulated', 'more'))
    for name, value in whole.items():  # gradients that waited were averaged early, which rounds otherwise
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    # An epoch is all twelve images, so PreciseBNHook's statistics are those of one batch of them.
    state = load_file(tmp_path / 'four' / 'epoch_4.pth')['state_dict']
    x = torch.stack([ToyDataset()[i]['inputs'] for i in range(12)]).double()
    out = torch.nn.functional.conv2d(x, state['conv.weight'].double(), state['conv.bias'].double())
    variance, mean = torch.var_mean(out, (0, 2, 3))
    torch.testing.assert_close(state['bn.running_mean'].double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(state['bn.running_var'].double(), variance, rtol=1e-6, atol=0)
    # Saved and evaluated by iteration, plain batch norm, whose statistics differ between processes.
    torch.set_num_threads(1)  # as torch.distributed.run gives each
    model = ToyModel().eval()
    model.load_state_dict(load_file(tmp_path / 'iters' / 'iter_3.pth')['state_dict'])
    images = [ToyDataset()[i]['inputs'][None] for i in range(5)]
    with torch.no_grad():
        scores = [model(image, None, 'predict')[0]['score'].item() for image in images]
    assert eval((tmp_path / 'iters.txt').read_text()) == scores


def test_a_resumed_schedule_goes_on_where_it_was(toy_runner, tmp_path: Path) -> None:
    toy_runner('two', train_cfg__max_epochs=2).train()
    runner = toy_runner('rest', load_from=str(tmp_path / 'two' / 'epoch_2.pth'), resume=True)
    rates = []
    runner.train()
    for line in (Path(runner.log_dir) / 'vis_data' / 'scalars.json').read_text().splitlines():
        values = json.loads(line)
        if 'lr' in values:
            rates.append((values['epoch'], round(values['lr'], 9)))
    # 0.16 x 2 / 16, and a tenth of it after the milestone, epoch 3.
    assert sorted(set(rates)) == [(3, 0.02), (4, 0.002)]


def test_checkpoints_hold_plain_types(toy_runner, tmp_path: Path) -> None:
    toy_runner(
        train_cfg__max_epochs=1,
        default_hooks__checkpoint=dict(type='CheckpointHook', save_best='toy/mean', rule='greater'),
    ).train()
    content = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=True)
    assert set(content) == {'meta', 'state_dict', 'optimizer', 'message_hub'}
    meta = content['meta']
    assert (meta['epoch'], meta['iter'], meta['seed']) == (1, 6, 3)
    assert meta['dataset_meta'] == dict(classes=('a', 'b'))
    assert "type='ToyModel'" in meta['cfg']
    assert (tmp_path / 'work' / 'last_checkpoint').read_text() == str(tmp_path / 'work' / 'epoch_1.pth')


def test_the_learning_rate_follows_the_total_batch(toy_runner, caplog: pytest.LogCaptureFixture) -> None:
    runner = toy_runner(train_cfg__max_epochs=1, optim_wrapper__accumulative_counts=2)
    with caplog.at_level(logging.INFO, logger=runner.logger.name):
        runner.logger.addHandler(caplog.handler)
        runner.train()
    assert 'Learning rate 0.16 x 4 / 16 = 0.04: scaled from a total batch of 16 to 4 images' in caplog.text
    assert '--cfg-options auto_scale_lr.enable=False' in caplog.text
    assert runner.optim_wrapper.optimizer.param_groups[0]['initial_lr'] == 0.04

    cycle = dict(type='OneCycleLR', eta_max=0.32, total_steps=8, by_epoch=False)
    for enable, factor in ((True, 2 / 16), (False, 1)):
        runner = toy_runner(str(enable), train_cfg__max_epochs=1, auto_scale_lr__enable=enable,
                            param_scheduler=[cycle])
        runner.train()
        assert runner.optim_wrapper.optimizer.param_groups[0]['max_lr'] == 0.32 * factor
    assert cycle['eta_max'] == 0.32


def test_weights_alone_cannot_be_resumed(toy_runner, tmp_path: Path) -> None:
    runner = toy_runner('a')
    save_checkpoint(dict(state_dict=runner.model.state_dict()), tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='holds weights only, no state of a training'):
        toy_runner('b', load_from=str(tmp_path / 'weights.pth'), resume=True).train()


def test_a_finished_training_cannot_be_resumed(toy_runner, tmp_path: Path) -> None:
    toy_runner('a', train_cfg__max_epochs=1).train()
    with pytest.raises(
        ValueError, match='is at epoch 1 of 1, nothing is left to train: raise train_cfg.max_epochs'
    ):
        toy_runner(
            'b', train_cfg__max_epochs=1, load_from=str(tmp_path / 'a/epoch_1.pth'), resume=True
        ).train()


def test_a_checkpoint_within_an_epoch_starts_that_epoch_again(toy_runner, tmp_path: Path) -> None:
    """Six iterations an epoch: the third checkpoint is at the end of the second one."""
    options = dict(default_hooks__checkpoint=dict(by_epoch=False, interval=4), train_cfg__val_interval=9)
    toy_runner('four', **options).train()
    folder = tmp_path / 'four'
    places = {i: load_file(folder / f'iter_{i}.pth')['meta'] for i in (8, 12, 24)}
    assert {i: (meta['epoch'], meta['batches']) for i, meta in places.items()} == {
        8: (1, 2), 12: (2, 0), 24: (4, 0)}
    toy_runner('end', load_from=str(folder / 'iter_12.pth'), resume=True, **options).train()
    assert_same(folder / 'iter_24.pth', tmp_path / 'end' / 'iter_24.pth')
    again = toy_runner('within', load_from=str(folder / 'iter_8.pth'), resume=True, **options)
    again.train()
    assert again.iter == 24
    log = Path(glob(f'{tmp_path}/within/*/*.log')[0]).read_text()
    assert 'iter_8.pth was written in epoch 2, which starts again: its first 2 batches' in log
    with pytest.raises(ValueError, match='is at epoch 4 of 4, nothing is left to train'):
        toy_runner('over', load_from=str(folder / 'iter_24.pth'), resume=True, **options).train()


def test_the_best_checkpoint_at_the_end_of_an_epoch_counts_it_once(toy_runner, tmp_path: Path) -> None:
    checkpoint = dict(by_epoch=False, interval=6, save_best='toy/mean', rule='greater')
    options = dict(default_hooks__checkpoint=checkpoint, train_cfg__max_epochs=1)
    toy_runner('a', **options).train()
    for name in ('iter_6', 'best_toy_mean_iter_6'):
        meta = load_file(tmp_path / 'a' / f'{name}.pth')['meta']
        assert (meta['epoch'], meta['iter'], meta.get('batches', 0)) == (1, 6, 0)


@pytest.mark.parametrize('workers', [0, 1])
def test_settings_of_worker_processes_count_where_there_are_some(toy_runner, workers: int) -> None:
    loader = toy_runner('a', train_dataloader__persistent_workers=True, train_dataloader__prefetch_factor=3,
                        train_dataloader__num_workers=workers).train_dataloader
    assert (loader.persistent_workers, loader.prefetch_factor) == (bool(workers), 3 if workers else None)


def test_a_finished_training_by_iteration_cannot_be_resumed(toy_runner, tmp_path: Path) -> None:
    options = dict(train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2),
                   default_hooks__checkpoint=dict(by_epoch=False, interval=2))
    toy_runner('a', **options).train()
    with pytest.raises(ValueError, match='is at iter 2 of 2, nothing is left to train: raise'):
        toy_runner('b', load_from=str(tmp_path / 'a' / 'iter_2.pth'), resume=True, **options).train()


@pytest.mark.parametrize('options, message', [
    (dict(optim_wrapper__optimizer=dict(_delete_=True, type='AdamW', lr=0.1)), 'state of another optimizer'),
    (dict(custom_hooks=[]), 'holds averaged weights: put the EMAHook that made them into custom_hooks'),
    (dict(param_scheduler=[dict(type='ReduceOnPlateauLR', monitor='toy/mean')]), 'what a ReduceOnPlateau'),
    (dict(train_dataloader__dataset__names=('b', 'a'), val_dataloader__dataset__names=('b', 'a')),
     'was trained on the classes a, b, but the data set of the config has b, a')])
def test_another_training_cannot_be_resumed(toy_runner, tmp_path: Path, options: dict, message: str) -> None:
    average = dict(custom_hooks=[dict(type='EMAHook')])
    toy_runner('a', train_cfg__max_epochs=1, **average).train()
    with pytest.raises(ValueError, match=message):
        toy_runner('b', load_from=str(tmp_path / 'a/epoch_1.pth'), resume=True, **average | options).train()


def test_a_checkpoint_of_another_program_cannot_be_resumed(toy_runner, tmp_path: Path) -> None:
    """mmdetection orders the parameters of a box head otherwise, and PyTorch compares no shapes."""
    toy_runner('a', train_cfg__max_epochs=1).train()
    content = load_file(tmp_path / 'a' / 'epoch_1.pth')
    state = content['optimizer']['state']
    state[0], state[1] = state[1], state[0]
    save_checkpoint(content, tmp_path / 'mixed.pth')
    with pytest.raises(ValueError, match='state of another optimizer, or of other parameters'):
        toy_runner('b', load_from=str(tmp_path / 'mixed.pth'), resume=True).train()
    del content['meta']['mmdet_version']
    save_checkpoint(content, tmp_path / 'foreign.pth')
    with pytest.raises(ValueError, match='is of another program, which orders .*: start from its weights'):
        toy_runner('c', load_from=str(tmp_path / 'foreign.pth'), resume=True).train()


def test_an_epoch_of_other_batches_leaves_the_schedule_by_iterations_in_its_place(
        toy_runner, tmp_path: Path) -> None:
    toy_runner('two', train_cfg__max_epochs=2).train()
    rest = toy_runner('rest', train_dataloader__batch_size=4, resume=True,
                      load_from=str(tmp_path / 'two' / 'epoch_2.pth'),
                      default_hooks__checkpoint=dict(by_epoch=False, interval=8))
    rest.train()
    assert rest.iter == rest.max_iters == 12
    meta = load_file(tmp_path / 'rest' / 'iter_8.pth')['meta']  # three iterations an epoch, no longer six
    assert (meta['epoch'], meta['batches']) == (2, 2)


def test_a_checkpoint_of_another_model_cannot_be_resumed(toy_runner, tmp_path: Path) -> None:
    save_checkpoint(
        dict(meta=dict(epoch=1, iter=6), optimizer={}, state_dict={'fc.bias': torch.zeros(1)}),
        tmp_path / 'other.pth',
    )
    with pytest.raises(ValueError, match='does not fit the model: 8 of 9 names missing'):
        toy_runner('b', load_from=str(tmp_path / 'other.pth'), resume=True).train()


def test_the_log_is_json_lines_and_tensorboard(toy_runner, tmp_path: Path) -> None:
    runner = toy_runner(train_cfg__max_epochs=1)
    runner.train()
    folder = Path(runner.log_dir) / 'vis_data'
    lines = [json.loads(line) for line in (folder / 'scalars.json').read_text().splitlines()]
    assert [line['step'] for line in lines if 'loss_toy' in line] == [2, 4, 6]
    assert 'toy/mean' in lines[-1]
    assert list(folder.glob('events.out.tfevents.*'))
