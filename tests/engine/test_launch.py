import argparse
import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mmdet.engine import launch


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_common_arguments(parser)
    parser.add_argument('--resume_from')
    return launch.parse_args(parser, argv)


def test_flags_take_dashes_and_underscores_and_values_stay() -> None:
    args = parse(
        '--work-dir', 'a-b', '--resume_from=c-d=e', '--local-rank', '0', '--cfg-options', 'a.b-c=x-y', 'n=2'
    )
    assert (args.work_dir, args.resume_from, args.local_rank) == ('a-b', 'c-d=e', 0)
    assert args.cfg_options == {'a.b-c': 'x-y', 'n': 2}


def test_slurm_tells_the_process_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT', 'OMP_NUM_THREADS'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    values = dict(
        SLURM_PROCID='9',
        SLURM_NTASKS='16',
        SLURM_LOCALID='1',
        SLURM_NODELIST='node[3-4]',
        SLURM_CPUS_PER_TASK='5',
        MASTER_ADDR='node3',
    )
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert launch.join_processes(parse('--launcher', 'slurm'), []) == 'pytorch'
    env = launch.os.environ
    assert [env[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT', 'OMP_NUM_THREADS')] == [
        '9',
        '16',
        '1',
        '29500',
        '5',
    ]


def test_slurm_outside_of_srun_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    with pytest.raises(ValueError, match="--launcher slurm: 'SLURM_PROCID' is not in the environment"):
        launch.join_processes(parse('--launcher', 'slurm'), [])


def test_processes_are_told_from_the_one_that_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'NNODES'):
        monkeypatch.delenv(name, raising=False)
    assert launch.join_processes(parse(), []) == 'none'
    started = []
    monkeypatch.setattr(launch, '_start_processes', lambda count, argv: started.append((count, argv)))
    assert launch.join_processes(parse('--gpus', '2'), ['x']) is None
    assert started == [(2, ['x'])]
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '0')
    assert launch.join_processes(parse('--gpus', '2'), ['x']) == 'pytorch'
    assert started == [(2, ['x'])]


@pytest.mark.parametrize(
    'gpus, message', [('0', 'at least one process'), ('2', '2 processes need 2 GPUs; this machine has 1')]
)
def test_impossible_numbers_of_processes(monkeypatch: pytest.MonkeyPatch, gpus: str, message: str) -> None:
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'NNODES'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch.torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(ValueError, match=message):
        launch.join_processes(parse('--gpus', gpus), [])


def status_of(main, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, 'argv', ['tool.py'])
    with pytest.raises(SystemExit) as end:
        launch.run_tool(main)
    return end.value.code


def test_threads_of_a_process_group_end_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that frees a tensor while the interpreter ends would abort it, seldom and after all is done."""
    def gloo_threads() -> int:
        return sum(path.read_text().startswith('pt_gloo') for path in Path('/proc/self/task').glob('*/comm'))

    def main(argv: list[str]) -> None:
        dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
        model = torch.nn.Linear(1, 1)
        model.group, model.cycle = dist.group.WORLD, [model]  # as distributed models have them
        dist.barrier()
        assert gloo_threads() > before

    before = gloo_threads()
    assert status_of(main, monkeypatch) == 0
    assert gloo_threads() == before


def test_expected_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from mmdet.checkpoint import load_file

    assert status_of(lambda argv: load_file('/no/file.pth'), monkeypatch) == 1
    assert capsys.readouterr().err == 'error: checkpoint /no/file.pth does not exist\n'


def test_errors_of_others_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert status_of(lambda argv: json.loads(''), monkeypatch) == 1
    assert 'Traceback' in capsys.readouterr().err
    assert status_of(lambda argv: {}['x'], monkeypatch) == 1
    assert 'KeyError' in capsys.readouterr().err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def stop(argv: object) -> None:
        raise KeyboardInterrupt

    def reformat(argv: object) -> None:  # as mmengine does while it formats a config
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise SyntaxError('Failed to format the config file') from error

    for main in (stop, reformat):
        assert status_of(main, monkeypatch) == 130
        assert capsys.readouterr().err == '\ninterrupted\n'


def test_of_several_processes_the_first_to_fail_speaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from mmdet.checkpoint import load_file

    for rank in '01':
        (tmp_path / rank).mkdir()
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / rank / 'error.json'))
        assert status_of(lambda argv: load_file('/no/file.pth'), monkeypatch) == 1
    assert capsys.readouterr().err.count('error: ') == 1


def test_a_lost_process_is_for_the_launcher_to_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def lose(argv: object) -> None:
        raise RuntimeError('[gloo/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer. GLHF!')

    assert status_of(lose, monkeypatch) == 1
    assert capsys.readouterr().err == 'error: another process of this job has ended\n'
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert status_of(lose, monkeypatch) == 1
    assert capsys.readouterr().err == ''


def test_a_process_whose_launcher_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_RUN_ID'):
        monkeypatch.setenv(name, '1')
    monkeypatch.setattr(launch.ctypes, 'CDLL', lambda name: SimpleNamespace(prctl=lambda *args: 0))
    args = argparse.Namespace(launcher='none', gpus=2)
    monkeypatch.setenv('MMDET_LAUNCHER_PID', str(os.getppid()))
    assert launch.join_processes(args, []) == 'pytorch'
    monkeypatch.setenv('MMDET_LAUNCHER_PID', str(os.getpid()))
    with pytest.raises(SystemExit):
        launch.join_processes(args, [])


def test_a_full_disk_without_a_name() -> None:
    line = launch.expected_error(OSError(errno.ENOSPC, 'No space left on device'))
    assert line == 'No space left on device: free some where logs and checkpoints are written (--work_dir)'


def test_what_the_loader_wraps_is_unwrapped() -> None:
    worker = FileNotFoundError(
        'Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback (most '
        'recent call last):\n  File "x.py", line 1\nFileNotFoundError: a/b.jpg does not exist: x\n'
    )
    assert launch.expected_error(worker) == 'a/b.jpg does not exist: x'
    killed = RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. \nmore')
    assert (launch.expected_error(killed) or '').startswith('DataLoader worker (pid 7) is killed by')


@pytest.mark.parametrize('key, value', [
    ('param_scheduler', [dict(type='LinearLR', begin=5, end=1)]),
    ('optim_wrapper__optimizer', dict(momentum=0, nesterov=True))])
def test_values_that_libraries_refuse_name_the_key(toy_runner, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f'^{key.partition("__")[0]}: [^\n]+$'):
        toy_runner('a', **{key: value}).train()


def test_a_bug_of_an_optimizer_keeps_its_traceback() -> None:
    with pytest.raises(TypeError), launch.errors_of('optim_wrapper'):
        raise TypeError('not of torch or mmengine')
    with pytest.raises(ValueError, match='^optim_wrapper: lr must be positive$'):
        with launch.errors_of('optim_wrapper'):
            raise ValueError('lr must be positive')
