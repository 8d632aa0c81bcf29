"""The process's share of the machine: threads, memory and device."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def available_cores() -> int:
    """Number of CPU cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(processes: int) -> int:
    """``OMP_NUM_THREADS``, or else the cores divided by the processes on this machine (at least 1).

    Raises:
        ValueError: ``OMP_NUM_THREADS`` is no positive number.
    """
    given = os.environ.get('OMP_NUM_THREADS')
    if given is None:
        return max(available_cores() // processes, 1)
    if not given.isdecimal() or int(given) == 0:
        raise ValueError(f'OMP_NUM_THREADS={given} in the environment must be a positive number')
    return int(given)


def setup_cpu() -> str:
    """Set PyTorch's threads and, without a GPU, tell malloc to keep freed memory.

    Returns:
        What was set, for the log.
    """
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    threads = threads_per_process(processes)
    torch.set_num_threads(threads)
    os.environ.setdefault('OMP_NUM_THREADS', str(threads))
    os.environ.setdefault('MKL_NUM_THREADS', str(threads))
    cores = available_cores()
    reason = f'{cores} cores' if processes == 1 else f'{cores} cores for {processes} processes'
    if threads != max(cores // processes, 1):
        reason = 'OMP_NUM_THREADS'
    kept = not torch.cuda.is_available() and keep_memory()
    return f'threads: {threads} a process ({reason})' + (', malloc keeps memory' if kept else '')


def has_cuda_kernels() -> bool:
    """Whether ``mmdet._C``, which is loaded, was built with CUDA."""
    return torch._C._dispatch_has_kernel_for_dispatch_key('mmdet::nms', 'CUDA')


def to_device(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Move a detector. On a GPU its convolutions' weights become channels-last, as its images are.

    Else each step would bring weights and their gradients from one layout into the other.

    Raises:
        ValueError: it is a GPU, for which the operators were not built.
    """
    if torch.device(device).type != 'cuda':
        return model.to(device)
    if not has_cuda_kernels():
        raise ValueError(f'device {device}: mmdet._C was built without CUDA: run ./compile.sh where there is '
                         'a GPU, or FORCE_CUDA=1 ./compile.sh elsewhere')
    return model.to(device).to(memory_format=torch.channels_last)


def keep_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; giving large tensors back and faulting them in again
    costs more than the arithmetic on them.

    Returns:
        Whether it took effect; False where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection: it would go again and again through millions of records without cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
