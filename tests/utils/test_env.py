import ctypes
import gc
import subprocess
import sys

import pytest
import torch

from mmdet.utils import env


@pytest.fixture
def two_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes on eight cores, without OMP_NUM_THREADS."""
    monkeypatch.setattr(env, 'available_cores', lambda: 8)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(env, 'keep_memory', lambda: True)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        monkeypatch.setenv(name, '')  # so that what setup_cpu sets is undone
        monkeypatch.delenv(name)


def test_cores_are_shared_by_the_processes(two_of_eight: None) -> None:
    assert env.setup_cpu() == 'threads: 4 a process (8 cores for 2 processes), malloc keeps memory'
    assert torch.get_num_threads() == 4


def test_omp_num_threads_comes_first(two_of_eight: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert env.setup_cpu() == 'threads: 1 a process (OMP_NUM_THREADS), malloc keeps memory'
    assert torch.get_num_threads() == 1


def test_there_is_at_least_one_thread(two_of_eight: None) -> None:
    assert env.threads_per_process(9) == 1


@pytest.mark.parametrize('given', ['0', 'many', '-1'])
def test_a_thread_count_must_be_a_number(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv('OMP_NUM_THREADS', given)
    with pytest.raises(
        ValueError, match=f'OMP_NUM_THREADS={given} in the environment must be a positive number'
    ):
        env.threads_per_process(1)


def test_malloc_keeps_memory() -> None:
    """After the call a freed gigabyte stays with the process; without it, it goes back to the system."""
    script = """
import sys, torch
from mmdet.utils.env import keep_memory
if sys.argv[1] == 'keep':
    assert keep_memory()
torch.ones(2**26); torch.ones(2**26)
print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')))
"""
    kept, plain = (
        int(
            subprocess.run(
                [sys.executable, '-c', script, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ('keep', 'plain')
    )
    assert kept - plain > 200_000  # KiB; the tensors take 262,144


def test_another_c_library_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
    assert env.keep_memory() is False


def test_weights_lie_as_the_images_do(device: torch.device) -> None:
    model = env.to_device(torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(2, 2)), device)
    weight, _, matrix, _ = model.parameters()
    assert weight.device.type == matrix.device.type == device.type
    assert weight.is_contiguous(memory_format=torch.channels_last) == (device.type == 'cuda')


def test_a_build_without_cuda_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, 'has_cuda_kernels', lambda: False)
    with pytest.raises(ValueError, match=r'^device cuda:0: .*without CUDA: run \./compile\.sh'):
        env.to_device(torch.nn.Linear(2, 2), 'cuda:0')


@pytest.mark.parametrize('enabled', [True, False])
def test_garbage_collection_is_as_before(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(KeyError), env.paused_gc():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
