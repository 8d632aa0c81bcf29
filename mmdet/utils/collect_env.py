"""What this machine has of all that mmdet needs: `python -m mmdet.utils.collect_env`."""
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

PACKAGES = ('torch', 'torchvision', 'mmengine', 'mmcv', 'cv2', 'numpy', 'pycocotools', 'hotcoco')


def summary(error: Exception) -> str:
    """One line of an exception: its type and the first line of its message."""
    return f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'


def package_version(name: str) -> str:
    """Version of an importable package; otherwise why it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken binary raises whatever it likes
        return f'cannot be imported ({summary(error)})'
    if hasattr(module, '__version__'):
        return str(module.__version__)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return 'unknown version'


def first_line(*command: str) -> str:
    """First line with a version in it that a program prints, or that it was not found."""
    try:
        text = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return f'not found ({command[0]})'
    lines = [line for line in text.splitlines() if any(char.isdigit() for char in line)]
    return next((line for line in lines if 'release' in line), lines[0] if lines else 'unknown version')


def cuda_compiler() -> str:
    """The nvcc that a build would find first: in CUDA_HOME, on PATH, or installed from pip."""
    home = os.environ.get('CUDA_HOME')
    nvcc = shutil.which('nvcc', path=os.path.join(home, 'bin')) if home else None
    pip = sorted(Path(sysconfig.get_path('purelib')).glob('nvidia/cu*/bin/nvcc'))
    nvcc = nvcc or shutil.which('nvcc') or next((str(path) for path in pip), None)
    if nvcc is None:
        return 'not found in CUDA_HOME, on PATH or from pip'
    return f'{first_line(nvcc, "--version")} ({nvcc})'


def gpus() -> str:
    """Names of the GPUs that torch can use, or why there are none."""
    try:
        import torch
    except Exception:
        return 'unknown without torch'
    if torch.version.cuda is None:
        return 'none: this torch is built without CUDA'
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        available = torch.cuda.is_available()
    if not available:
        reason = str(caught[0].message).splitlines()[0] if caught else 'torch finds none'
        return f'none: {reason}'
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ', '.join(f'{i}: {name}' for i, name in enumerate(names))


def extension() -> str:
    """Whether `mmdet._C` is there and built with CUDA, and what to do where that is not enough."""
    try:
        import torch
        importlib.import_module('mmdet._C')
        from mmdet.utils.env import has_cuda_kernels
    except ModuleNotFoundError as error:
        what = 'not built' if error.name == 'mmdet._C' else f'cannot be loaded without {error.name}'
        return f'{what}: run ./compile.sh'
    except Exception as error:  # mostly a symbol that another torch had
        return f'cannot be loaded, so build it again with ./compile.sh ({summary(error)})'
    if has_cuda_kernels():
        return 'C++ and CUDA'
    if torch.cuda.is_available():
        return 'C++ alone, although there is a GPU: run ./compile.sh, which installs a CUDA compiler'
    if torch.version.cuda is None:
        return 'C++ alone: this torch is built without CUDA'
    return 'C++ alone: built with no GPU and no CUDA compiler (FORCE_CUDA=1 ./compile.sh installs one)'


def collect_env() -> dict[str, str]:
    """Versions and state of everything that a report of a problem should name, by a readable label."""
    env = {'python': f'{platform.python_version()} ({sys.executable})', 'system': platform.platform()}
    env |= {name: package_version(name) for name in PACKAGES}
    if not env['torch'].startswith('cannot'):
        import torch
        env['torch'] += f' (CUDA {torch.version.cuda})' if torch.version.cuda else ' (no CUDA)'
    env['GPU'] = gpus()
    env['C++ compiler'] = first_line(os.environ.get('CXX', 'c++'), '--version')
    env['nvcc'] = cuda_compiler()
    env['mmdet'] = package_version('mmdet')
    env['mmdet._C'] = extension()
    return env


if __name__ == '__main__':
    for label, value in collect_env().items():
        print(f'{label + ":":14} {value}')
