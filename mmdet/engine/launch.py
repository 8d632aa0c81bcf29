"""What the command-line tools share: flags, several processes, errors."""

import argparse
import ctypes
import errno
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import mmengine
import torch
import torch.distributed

import mmdet
from mmdet.utils.cfg_options import CfgOptions
from mmdet.utils.env import threads_per_process

_PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that comes when the parent ends
_PARENT = 'MMDET_LAUNCHER_PID'  # in the environment of the processes that this command starts
# Errors that tell the user all there is to know, if it is our code that raises them.
_EXPECTED = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that training and testing have in common."""
    parser.add_argument('--work_dir', help='folder of logs and checkpoints (default: work_dirs/CONFIG NAME)')
    parser.add_argument('--gpus', type=int, default=1, metavar='N',
                        help='start N processes, one a GPU, or N on the CPU where there is no GPU')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none',
                        help='what has started the processes, if not this command')
    parser.add_argument('--local_rank', type=int, help='ignored; old launchers pass it')
    parser.add_argument('--amp', nargs='?', const='auto', choices=['auto', 'bf16', 'fp16'],
                        help='mixed precision (default fp16 on a GPU, bf16 on the CPU)')
    parser.add_argument('--trust_checkpoint', action='store_true',
                        help='load a checkpoint even if it holds what could run code')
    parser.add_argument('--legacy_2019', action='store_true',
                        help='use the numerics and recipe of the 2019 code')
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg_options``, which all tools take that load a config."""
    parser.add_argument('--cfg_options', nargs='+', action=CfgOptions, default={}, metavar='KEY=VALUE',
                        help='override settings of the config: model.backbone.depth=101')


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; ``--work-dir`` is ``--work_dir``, and so for all flags. Values stay as they are."""
    parser.epilog = 'Flags may be written with dashes or underscores.'
    return parser.parse_args([re.sub(r'^--[\w-]+', lambda flag: '--' + flag[0][2:].replace('-', '_'), word)
                              for word in argv])


def join_processes(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """Be one process of many, or start them.

    Returns:
        The launcher for the runner's config ('none' or 'pytorch'); None in a process that has started
        others and has nothing to do but exit.

    Raises:
        ValueError: more processes than GPUs.
    """
    if args.launcher == 'slurm':
        _slurm_environment()
        return 'pytorch'
    if args.launcher == 'pytorch' or {'RANK', 'WORLD_SIZE', 'LOCAL_RANK'} <= os.environ.keys():
        if 'TORCHELASTIC_RUN_ID' in os.environ and sys.platform == 'linux':
            # Else a killed launcher would leave its processes, which write where the next ones do.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
                sys.exit(1)  # it was killed before
        return 'pytorch'
    if args.gpus < 1:
        raise ValueError(f'--gpus {args.gpus}: at least one process is needed')
    if args.gpus == 1 and _machines() == 1:
        return 'none'
    _start_processes(args.gpus, argv)
    return None


def _machines() -> int:
    number = os.environ.get('NNODES', '1')
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f'NNODES={number}: the number of machines is needed')
    return int(number)


def _start_processes(count: int, argv: Sequence[str]) -> None:
    """Run this command ``count`` times under torch.distributed.run and wait; exits with their status.

    ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` in the environment join several machines.
    """
    gpus = torch.cuda.device_count()
    if gpus and count > gpus:
        raise ValueError(f'{count} processes need {count} GPUs; this machine has {gpus}')
    os.environ[_PARENT] = str(os.getpid())
    os.environ['OMP_NUM_THREADS'] = str(threads_per_process(count))  # torch.distributed.run would set 1
    logging.disable(logging.ERROR)  # its words on a failed process; the process itself has said why
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    env = os.environ
    # Port 0 is any free one.
    options = ['--rdzv_backend=c10d', '--rdzv_endpoint=127.0.0.1:0', '--local_addr=127.0.0.1']
    if 'MASTER_PORT' in env or _machines() > 1:
        options = [f'--nnodes={_machines()}', f'--node_rank={env.get("NODE_RANK", 0)}',
                   f'--master_addr={env.get("MASTER_ADDR", "127.0.0.1")}',
                   f'--master_port={env.get("MASTER_PORT", 29500)}']
    config: Any
    config, command, arguments = run.config_from_args(
        run.parse_args([*options, f'--nproc_per_node={count}', sys.argv[0], *argv]))
    try:
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as error:
        # A process that was killed takes others down with it, which may be noticed in any order.
        first = [item for item in error.failures.items() if item[1].exitcode not in (1, -signal.SIGTERM)]
        rank, failure = min(first or [error.get_first_failure()], key=lambda item: item[1].exitcode)
        if failure.exitcode < 0:
            print(f'error: process {rank} was ended by signal {-failure.exitcode}'
                  + (' (out of memory?)' if failure.exitcode == -9 else ''), file=sys.stderr)
        elif not any(Path(config.logs_specs.root_log_dir).glob('*/attempt_*/failed')):  # none has spoken
            print(f'error: process {rank} ended with status {failure.exitcode}; where nothing says why, '
                  'another one, perhaps on another machine, ended before', file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except torch.distributed.DistNetworkError as error:
        raise OSError(f'{" ".join(options)}: {str(error).splitlines()[0]}') from error
    except SignalException as stopped:
        raise KeyboardInterrupt from stopped


def _slurm_environment() -> None:
    """Translate what srun tells a task into what torch.distributed reads."""
    env = os.environ
    try:
        env['RANK'], env['WORLD_SIZE'] = env['SLURM_PROCID'], env['SLURM_NTASKS']
        env['LOCAL_RANK'] = env['SLURM_LOCALID']
        nodes = env['SLURM_NODELIST']
    except KeyError as missing:
        raise ValueError(f'--launcher slurm: {missing} is not in the environment; start with srun '
                         '(tools/slurm_train.sh)') from None
    if 'MASTER_ADDR' not in env:
        names = subprocess.check_output(['scontrol', 'show', 'hostnames', nodes], text=True)
        env['MASTER_ADDR'] = names.split()[0]
    env.setdefault('MASTER_PORT', '29500')
    if 'SLURM_CPUS_PER_TASK' in env:
        env.setdefault('OMP_NUM_THREADS', env['SLURM_CPUS_PER_TASK'])


def run_tool(main: Callable[[Sequence[str]], None], interrupted: str = 'interrupted') -> NoReturn:
    """Run ``main`` on the command line's arguments and exit: 0, 1 after an error, 130 after Ctrl-C.

    An expected error is one line on stderr. Of several processes, the first to fail speaks.
    """
    status = 0
    try:
        main(sys.argv[1:])
    except (KeyboardInterrupt, Exception) as error:
        if was_interrupted := _comes_from_interrupt(error):
            if 'TORCHELASTIC_RUN_ID' not in os.environ:  # else the process that started this one speaks
                print(f'\n{interrupted}', file=sys.stderr)
        elif not (_lost_another(error) and 'TORCHELASTIC_RUN_ID' in os.environ) and _first_to_fail():
            line = expected_error(error)
            if line is None:
                traceback.print_exc()
            else:
                print(f'error: {line}', file=sys.stderr)
        status = 130 if was_interrupted else 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        if status:
            os._exit(status)  # an orderly end would wait for the other processes, or abort with noise
        gc.collect()  # models hold the process group, whose threads must end before the interpreter does
        torch.distributed.destroy_process_group()
    sys.exit(status)


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or what a library that catches everything has made of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _lost_another(error: BaseException) -> bool:
    """Whether it says that another process of the job has ended, as gloo and NCCL put it."""
    return isinstance(error, RuntimeError) and bool(
        re.search('Connection (reset|closed) by peer|remote process exited', str(error)))


def _first_to_fail() -> bool:
    """Whether no other process of this machine's job has failed before."""
    error_file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if error_file is None:
        return True
    try:  # .../attempt_0/RANK/error.json
        (Path(error_file).parent.parent / 'failed').touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def expected_error(error: BaseException) -> str | None:
    """What to tell the user about an error that is no bug; None for one that needs a traceback."""
    if isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker (pid'):
        return f'{str(error).splitlines()[0]} (out of memory? give a smaller train_dataloader.num_workers)'
    if _lost_another(error):
        return 'another process of this job has ended'
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return f'{error.strerror}: free some where logs and checkpoints are written (--work_dir)'
    if not isinstance(error, _EXPECTED):
        return None
    worker = re.match(r'Caught \w+ in DataLoader worker', str(error))
    if worker:  # the text is the worker's traceback, with the error at its end
        return str(error).rstrip().rsplit('\n', 1)[-1].partition(': ')[2]
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(mmdet.__file__).parent), str(Path(sys.argv[0]).resolve().parent))
    raised_here = bool(frames) and str(Path(frames[-1].filename).resolve()).startswith(ours)
    if raised_here or isinstance(error, (OSError, torch.OutOfMemoryError)):
        return str(error)
    return None


@contextmanager
def errors_of(key: str) -> Iterator[None]:
    """Name the key of the config in what torch and mmengine say of its values."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        theirs = raised_in.startswith(tuple(f'{module.__path__[0]}{os.sep}' for module in (torch, mmengine)))
        if expected_error(error) or not theirs and not isinstance(error, ValueError):
            raise
        raise ValueError(f'{key}: {str(error).partition(chr(10))[0]}') from error
