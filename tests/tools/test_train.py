import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdet.checkpoint import load_file

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / 'tests' / 'engine' / 'toy_config.py'
ON_CPU = dict(CUDA_VISIBLE_DEVICES='')


def test_two_processes_train_validate_and_resume(run_toy, tmp_path: Path) -> None:
    options = ('--validate', '2', '--work-dir', 'w', '--cfg-options', 'train_dataloader.num_workers=1',
               'model.norm=SyncBN', 'val_evaluator.out=val.pkl')
    done = run_toy('tools/dist_train.sh', TOY, 2, '--seed', 5, *options, 'train_cfg.max_epochs=2', **ON_CPU)
    assert done.returncode == 0, done.stderr
    threads = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert f'work_dir: {tmp_path}/w, seed: 5, processes: 2, threads: {threads} a process' in done.stdout
    assert done.stdout.count('malloc keeps memory') == 1
    assert 'Failed to search registry' not in done.stdout
    assert 'Learning rate 0.16 x 4 / 16 = 0.04' in done.stdout
    assert 'eta: ' in done.stdout and 'loss_toy: ' in done.stdout
    assert done.stdout.count('toy/mean: ') == 1
    assert (tmp_path / 'w' / 'toy_config.py').is_file()

    done = run_toy('tools/train.py', TOY, '--gpus', 2, '--resume_from', 'auto', *options, **ON_CPU)
    assert done.returncode == 0, done.stderr
    assert 'seed: 5 (of the checkpoint)' in done.stdout
    assert (
        f'Resumed from {tmp_path}/w/epoch_2.pth' in done.stdout or 'Resumed from w/epoch_2.pth' in done.stdout
    )
    assert load_file(tmp_path / 'w' / 'epoch_4.pth')['meta']['seed'] == 5
    assert 'Trained batch norm (layers: 1, first: bn) has statistics of 4 images a step' in done.stdout

    # What training evaluated is what the checkpoint gives, to the bit.
    done = run_toy('tools/test.py', TOY, 'w/epoch_4.pth', '--gpus', 2, '--out', 'test.pkl',
                   '--cfg-options', 'model.norm=SyncBN', **ON_CPU)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'val.pkl').read_text() == (tmp_path / 'test.pkl').read_text()


def test_no_evaluation_without_validate_and_a_default_work_dir(run_toy, tmp_path: Path) -> None:
    done = run_toy('tools/train.py', TOY, '--amp', '--cfg-options', 'train_cfg.max_epochs=1', **ON_CPU)
    assert done.returncode == 0, done.stderr
    assert 'Epoch(val)' not in done.stdout
    assert (tmp_path / 'work_dirs' / 'toy_config' / 'epoch_1.pth').is_file()


@pytest.mark.parametrize('interval, evaluations', [([], 2), ([3], 2), ([9], 1)])
def test_evaluation_in_training_by_iteration(
    run_toy, tmp_path: Path, interval: list[int], evaluations: int
) -> None:
    """As often as the config says, or every K iterations; and after the last."""
    config = tmp_path / 'iters.py'
    config.write_text(f"_base_ = '{TOY}'\ntrain_cfg = dict(_delete_=True, type='IterBasedTrainLoop', "
                      "max_iters=4, val_interval=2)\ndefault_hooks = dict(checkpoint=dict(by_epoch=False))\n")
    done = run_toy('tools/train.py', config, '--validate', *interval, **ON_CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('toy/mean: ') == evaluations


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['toy_confg.py'], 'error: toy_confg.py: no such config file'),
        ([TOY, '--resume_from', 'no.pth'], 'error: checkpoint no.pth does not exist'),
        ([TOY, '--resume_from', 'auto', '--cfg_options', 'load_from=a.pth'], 'error: checkpoint a.pth '),
        ([TOY, '--seed', '-5'], 'error: the seed must be from 0 to 4294967295, not -5'),
        ([TOY, '--amp', 'fp16'], 'error: float16 training needs a GPU; on the CPU use bfloat16 (--amp bf16)'),
        (
            [TOY, '--cfg_options', 'model.nan_from=7'],
            'error: the loss is not finite at epoch 2, iteration 2 (loss nan',
        ),
        (
            [TOY, '--cfg-options', 'train_dataloader.dataset.missing=3', 'train_dataloader.num_workers=1'],
            'error: image 3 does not exist',
        ),
    ],
)
def test_errors_are_one_line(run_toy, arguments: list, message: str) -> None:
    done = run_toy('tools/train.py', *arguments, **ON_CPU)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)
    assert 'Traceback' not in done.stdout


def test_compiling_without_a_compiler_is_one_line(run_toy) -> None:
    done = run_toy('tools/train.py', TOY, '--compile', CXX='no-such-compiler', **ON_CPU)
    assert done.returncode == 1
    assert done.stderr.startswith('error: --compile needs a C++ compiler, and there is no no-such-compiler')


def test_an_error_of_several_processes_is_said_once(run_toy) -> None:
    done = run_toy('tools/dist_train.sh', TOY, 2, '--resume-from', 'no.pth', **ON_CPU)
    assert done.returncode == 1
    assert done.stderr == 'error: checkpoint no.pth does not exist\n'


def test_a_killed_process_ends_the_job(run_toy) -> None:
    done = run_toy('tools/dist_train.sh', TOY, 2, TOY_KILL_RANK='1', **ON_CPU)
    assert done.returncode != 0
    assert 'error: process 1 was ended by signal 9 (out of memory?)' in done.stderr.splitlines()
    assert 'Traceback' not in done.stderr


def test_of_a_process_that_ends_without_a_word_the_launcher_speaks(run_toy) -> None:
    done = run_toy('tools/dist_train.sh', TOY, 2, TOY_EXIT_RANK='1', **ON_CPU)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith('error: process 1 ended with status 3; ')


def test_the_scripts_say_how_they_are_used(run_toy) -> None:
    for tool, words in (
        ('dist_train.sh', 'CONFIG N'),
        ('dist_test.sh', 'CONFIG CHECKPOINT N'),
        ('slurm_train.sh', 'PARTITION JOB_NAME CONFIG WORK_DIR'),
        ('slurm_test.sh', 'PARTITION JOB_NAME CONFIG CHECKPOINT'),
    ):
        done = run_toy(f'tools/{tool}')
        assert done.returncode == 2
        assert done.stderr.startswith(f'Usage: tools/{tool} {words}')


# Slow: Python drops an interrupt that arrives inside a callback, and then this waits in vain.
@pytest.mark.slow
def test_ctrl_c_leaves_whole_checkpoints(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TOY.parent), str(ROOT), os.environ.get('PYTHONPATH', '')])
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / 'tools' / 'train.py'),
            str(TOY),
            '--work_dir',
            'w',
            '--cfg-options',
            'train_cfg.max_epochs=100000',
        ],
        cwd=tmp_path,
        env=os.environ | ON_CPU | dict(PYTHONPATH=path),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    try:
        while not list(tmp_path.glob('w/epoch_*.pth')):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.endswith('interrupted; every checkpoint is whole, go on with --resume_from auto\n')
    assert 'Traceback' not in error
    for file in tmp_path.glob('w/epoch_*.pth'):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize('tool, words, env, job, command', [
    ('train', 'c.py w 4', dict(SRUN_ARGS='--time=1 --qos=x'),
     '--gres=gpu:4 --ntasks=4 --ntasks-per-node=4 --cpus-per-task=5 --kill-on-bad-exit=1 --time=1 --qos=x',
     'c.py --work_dir w --launcher slurm --validate'),
    ('train', 'c.py w --cfg-options a=b', dict(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='3'),
     '--gres=gpu:4 --ntasks=16 --ntasks-per-node=4 --cpus-per-task=3 --kill-on-bad-exit=1',
     'c.py --work_dir w --launcher slurm --validate --cfg-options a=b'),
    ('train', 'c.py w 16 --seed 5', dict(GPUS='4', PY_ARGS=''),
     '--gres=gpu:8 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=5 --kill-on-bad-exit=1',
     'c.py --work_dir w --launcher slurm --seed 5'),
    ('test', 'c.py e.pth --out r.pkl', dict(SRUN_ARGS='--time=1 --qos=x'),
     '--gres=gpu:8 --ntasks=8 --ntasks-per-node=8 --cpus-per-task=5 --kill-on-bad-exit=1 --time=1 --qos=x',
     'c.py e.pth --launcher slurm --out r.pkl'),
    ('test', 'c.py e.pth', dict(GPUS='2', CPUS_PER_TASK='3'),
     '--gres=gpu:2 --ntasks=2 --ntasks-per-node=2 --cpus-per-task=3 --kill-on-bad-exit=1',
     'c.py e.pth --launcher slurm'),
    ('test', 'c.py e.pth', dict(GPUS='16', GPUS_PER_NODE='4'),
     '--gres=gpu:4 --ntasks=16 --ntasks-per-node=4 --cpus-per-task=5 --kill-on-bad-exit=1',
     'c.py e.pth --launcher slurm'),
])
def test_srun_gets_the_arguments(
    run_toy, tmp_path: Path, tool: str, words: str, env: dict[str, str], job: str, command: str
) -> None:
    (tmp_path / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    done = run_toy(f'tools/slurm_{tool}.sh', 'gpu', 'job', *words.split(), PATH=path, PYTHON='py', **env)
    assert done.stdout.splitlines() == [
        '--partition=gpu', '--job-name=job', *job.split(),
        'py', '-u', str(ROOT / 'tools' / f'{tool}.py'), *command.split()]
