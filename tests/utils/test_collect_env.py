"""The report of the environment."""
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mmdet.utils import collect_env as env

ROOT = Path(__file__).resolve().parents[2]


def test_reports_what_is_installed() -> None:
    report = env.collect_env()
    assert report['python'] == f'{sys.version.split()[0]} ({sys.executable})'
    assert report['torch'].startswith(f'{torch.__version__} (')
    assert report['hotcoco'] == metadata.version('hotcoco')
    assert report['pycocotools'] == metadata.version('pycocotools')
    assert report['mmdet._C'].startswith(('C++ and CUDA', 'C++ alone'))
    assert (report['GPU'].startswith('none')) == (not torch.cuda.is_available())


@pytest.mark.parametrize('source, answer', [
    ('raise ModuleNotFoundError("No module named _C", name="mmdet._C")', 'not built: run ./compile.sh'),
    ('raise ImportError("undefined symbol: _ZN3c10\\nmore")',
     'cannot be loaded, so build it again with ./compile.sh (ImportError: undefined symbol: _ZN3c10)'),
    ('import nowhere', 'cannot be loaded without nowhere: run ./compile.sh'),
])
def test_says_what_is_wrong_with_the_extension(source: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / 'mmdet').mkdir()
    (tmp_path / 'mmdet' / '__init__.py').touch()
    (tmp_path / 'mmdet' / '_C.py').write_text(source)
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport runpy, mmdet\n' \
           f'print(runpy.run_path({env.__file__!r})["extension"]())'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert (run.stdout.strip(), run.stderr) == (answer, '')


def test_a_package_that_fails_to_import_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'broken_binary.py').write_text('raise OSError("libGL.so.1: cannot open shared object file")')
    monkeypatch.syspath_prepend(tmp_path)
    assert env.package_version('broken_binary') == (
        'cannot be imported (OSError: libGL.so.1: cannot open shared object file)')


def test_finds_nvcc_in_cuda_home_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / 'bin' / 'nvcc'
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "Copyright 2005-2025"\necho "tools, release 13.2, V13.2.86"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    assert env.cuda_compiler() == f'tools, release 13.2, V13.2.86 ({nvcc})'
    monkeypatch.setenv('CUDA_HOME', '')
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(env.sysconfig, 'get_path', lambda name: str(tmp_path))
    assert env.cuda_compiler() == 'not found in CUDA_HOME, on PATH or from pip'
    pip = tmp_path / 'nvidia' / 'cu13' / 'bin' / 'nvcc'
    pip.parent.mkdir(parents=True)
    nvcc.rename(pip)
    assert env.cuda_compiler().endswith(f'({pip})')


def test_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    (tmp_path / 'pycocotools.py').touch()  # a package that does not say its version
    code = (f'import runpy; env = runpy.run_path({env.__file__!r})["collect_env"]()\n'
            'print(env["pycocotools"], env["GPU"], env["mmdet._C"], sep="; ")')
    run = subprocess.run([sys.executable, '-S', '-c', code], capture_output=True, text=True, cwd=tmp_path,
                         env={'PYTHONPATH': str(tmp_path)})
    assert (run.stdout.strip(), run.stderr) == (
        'unknown version; unknown without torch; cannot be loaded without torch: run ./compile.sh', '')


def test_runs_as_a_module() -> None:
    command = [sys.executable, '-m', 'mmdet.utils.collect_env']
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, '')
    labels = [line.split(':')[0] for line in run.stdout.splitlines()]
    assert labels[0] == 'python' and labels[-1] == 'mmdet._C' and 'nvcc' in labels
