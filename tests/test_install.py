"""The set-up: what it asks pip for, which compiler it takes, and the one line that it fails with."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location('mmdet_setup', ROOT / 'setup.py')
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup() -> ModuleType:
    """A fresh copy of setup.py as a module."""
    return load_setup()


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items()
             if key not in {'PYTHON', 'CXX', 'FORCE_CUDA', 'CUDA_HOME', 'VIRTUAL_ENV'}}
    return subprocess.run(command, env=clean | env, capture_output=True, text=True, cwd=ROOT)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


def distribution(folder: Path, name: str, version: str) -> None:
    """Metadata of an installed distribution, for a PYTHONPATH."""
    path = folder / f'{name}-{version}.dist-info'
    path.mkdir()
    (path / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


def interpreter(folder: Path, *cases: str) -> Path:
    """A stub of Python 3.12 in this folder, which answers more by shell cases of its arguments."""
    (folder / 'Python.h').touch()
    lines = '\n'.join([*cases, '*version_info*) echo 3.12 ;;', '*GIL*) echo 0 ;;', f'*) echo "{folder}" ;;'])
    return program(folder / 'bin' / 'python', f'case "$*" in\n{lines}\nesac')


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of a set-up that could not work."""
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


# Requirements

def test_every_requirement_is_a_name_with_a_lower_bound(setup: ModuleType) -> None:
    lines = setup.build_requirements() + setup.requirements() + setup.test_requirements()
    assert all(re.fullmatch(r'[A-Za-z][\w-]*>=\d+(\.\d+)*', line) for line in lines)
    names = [line.split('>=')[0] for line in lines]
    assert len(set(names)) == len(names)
    assert {'torch', 'torchvision', 'hotcoco', 'pycocotools', 'pytest'} <= set(names)
    assert 'apex' not in names  # the package of that name is not NVIDIA's
    assert 'torch>=2.11' in lines


def test_requirements_are_met_here(setup: ModuleType) -> None:
    assert setup.missing(setup.requirements()) == []


def test_missing_compares_numbers(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {'a': '2.9.1', 'b': '2.15.0+cu132', 'c': '0.10.7rc1', 'd': '2'}
    monkeypatch.setattr(setup, 'installed', versions.get)
    assert setup.missing(['a>=2.11', 'b>=2.11', 'c>=0.10.7', 'd>=2', 'e>=1']) == ['a>=2.11', 'e>=1']


def test_a_drop_in_package_is_accepted(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, 'installed', {'onedl-mmengine': '0.10.12', 'mmcv': '2.2.0'}.get)
    names = [line.split('>=')[0] for line in setup.requirements()]
    assert 'onedl-mmengine' in names and 'mmengine' not in names
    assert 'mmcv' in names and 'mmcv-lite' not in names
    assert 'opencv-python-headless' in names


# The CUDA compiler

def toolkit(folder: Path, release: str, compiles: bool = True) -> Path:
    """A folder with an nvcc that says it is of this release."""
    program(folder / 'bin' / 'nvcc', f'''case $1 in
        --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
        *) {'exit 0' if compiles else 'echo "unsupported GNU version" >&2; exit 1'} ;;
    esac''')
    return folder


@pytest.fixture
def cuda(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py with a torch of CUDA 13.2 and no compiler anywhere."""
    monkeypatch.setattr(torch.version, 'cuda', '13.2')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(setup, 'pip_cuda_home', lambda: tmp_path / 'pip')
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    for name in ('CUDA_HOME', 'FORCE_CUDA'):
        monkeypatch.delenv(name, raising=False)
    return setup


def test_cuda_home_comes_before_path_and_path_before_pip(
        cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cuda.find_cuda_home() is None
    for name, variable in (('pip', None), ('path', 'PATH'), ('home', 'CUDA_HOME')):
        home = toolkit(tmp_path / name, '13.0')
        if variable:
            monkeypatch.setenv(variable, str(home if name == 'home' else home / 'bin'))
        cuda.find_cuda_home.cache_clear()
        assert cuda.find_cuda_home() == home


def test_a_wrapper_on_path_leads_to_its_toolkit(setup: ModuleType, tmp_path: Path) -> None:
    wrapper = program(tmp_path / 'bin' / 'nvcc', 'echo "#$ _SPACE_= " >&2; echo "#$ TOP=/opt/x/bin/.." >&2')
    assert setup.toolkit_of(str(wrapper)) == Path('/opt/x')
    assert setup.toolkit_of(str(toolkit(tmp_path / 'plain', '13.0') / 'bin' / 'nvcc')) == tmp_path / 'plain'


@pytest.mark.parametrize('release, compiles, why', [
    ('12.8', True, 'it is release 12.8, while torch was built with CUDA 13.2'),
    ('13.0', False, 'it cannot compile: unsupported GNU version'),
])
def test_a_compiler_that_cannot_be_used_is_passed_over(
        release: str, compiles: bool, why: str, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = toolkit(tmp_path / 'home', release, compiles)
    monkeypatch.setenv('CUDA_HOME', str(home))
    assert cuda.find_cuda_home() is None
    assert capsys.readouterr().err == f'note: {home}/bin/nvcc is not used: {why}\n'


def test_the_compiler_from_pip_is_of_torchs_minor_version(
        cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cuda.missing_cuda_compiler() == []  # no GPU: C++ alone
    wanted = ['nvidia-cuda-nvcc==13.2.*', 'nvidia-nvvm==13.2.*', 'nvidia-cuda-crt==13.2.*']
    monkeypatch.setenv('FORCE_CUDA', '1')
    assert cuda.missing_cuda_compiler() == wanted
    monkeypatch.delenv('FORCE_CUDA')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert cuda.missing_cuda_compiler() == wanted
    cuda.find_cuda_home.cache_clear()
    toolkit(tmp_path / 'pip', '13.2')
    assert cuda.missing_cuda_compiler() == []


def test_forced_cuda_needs_a_torch_that_has_it(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('FORCE_CUDA', '1')
    monkeypatch.setattr(torch.version, 'cuda', None)
    with pytest.raises(SystemExit, match='^error: FORCE_CUDA=1, but torch .* has no CUDA: '):
        cuda.missing_cuda_compiler()


# One line for what cannot work

def test_a_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / 'torch.py').write_text('raise ModuleNotFoundError("No module named torch", name="torch")')
    line = error_of(run(sys.executable, 'setup.py', 'build_ext', PYTHONPATH=str(tmp_path)))
    assert line.startswith('error: this build sees no torch: run `pip install --no-build-isolation .`')


def test_an_old_torch_is_named(tmp_path: Path) -> None:
    (tmp_path / 'torch.py').write_text('__version__ = "2.9.1+cpu"')
    line = error_of(run(sys.executable, 'setup.py', 'build_ext', PYTHONPATH=str(tmp_path)))
    assert line.startswith('error: torch 2.9.1+cpu is installed, 2.11 or later is needed')


def test_an_old_build_requirement_is_named(tmp_path: Path) -> None:
    (tmp_path / 'torch.py').write_text('__version__ = "2.14.1"')
    distribution(tmp_path, 'ninja', '1.10')
    line = error_of(run(sys.executable, 'setup.py', 'build_ext', PYTHONPATH=str(tmp_path)))
    assert re.match(r"error: this build needs (ninja>=[\d.]+): run `pip install '\1'` ", line)


@pytest.mark.parametrize('version', ['2.7', '3.10', '3.14'])
def test_compile_names_an_unsuitable_python(version: str, tmp_path: Path) -> None:
    python = program(tmp_path / 'python', f'echo {version}')
    line = error_of(run('./compile.sh', PYTHON=str(python)))
    assert line == (f'error: {python} is Python {version}, and 3.11 to 3.13 is needed: '
                    'name another one with PYTHON=...')


@pytest.mark.parametrize('safe_path', ['', '1'])
def test_compile_refuses_to_stand_beside_another_mmdet(safe_path: str, tmp_path: Path) -> None:
    distribution(tmp_path, 'mmdet', '3.3.0')
    line = error_of(run('./compile.sh', PYTHON=sys.executable, PYTHONPATH=str(tmp_path),
                        PYTHONSAFEPATH=safe_path))
    assert line == (f"error: OpenMMLab's mmdet is installed in {sys.prefix}, and Python would import it "
                    "instead of this one: run 'pip uninstall mmdet' there, or use a fresh environment")


def test_compile_names_a_missing_python() -> None:
    line = error_of(run('./compile.sh', PYTHON='/nonexistent/python'))
    assert line.startswith('error: there is no /nonexistent/python: ')


def test_compile_names_missing_headers(tmp_path: Path) -> None:
    answers = f'case "$2" in *version_info*) echo 3.12 ;; *) echo {tmp_path} ;; esac'
    python = program(tmp_path / 'python', answers)
    line = error_of(run('./compile.sh', PYTHON=str(python)))
    assert line.startswith(f'error: {tmp_path}/Python.h is missing: install the headers of Python 3.12')


def test_compile_names_a_missing_compiler() -> None:
    line = error_of(run('./compile.sh', PYTHON=sys.executable, CXX='/nonexistent'))
    assert line == 'error: CXX=/nonexistent is not a program: name a C++ compiler, or unset CXX'


def test_compile_names_a_compiler_that_is_too_old(tmp_path: Path) -> None:
    compiler = program(tmp_path / 'c++', 'echo "c++: error: no option -std=c++20" >&2; exit 1')
    line = error_of(run('./compile.sh', PYTHON=sys.executable, CXX=str(compiler)))
    assert line == f'error: {compiler} cannot build C++20 with OpenMP: c++: error: no option -std=c++20'


def test_compile_names_an_environment_whose_python_is_gone(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / 'compile.sh', tmp_path)
    link = tmp_path / '.venv' / 'bin' / 'python'
    link.parent.mkdir(parents=True)
    link.symlink_to('/nonexistent/python')
    line = error_of(run(script, PYTHON=str(interpreter(tmp_path))))
    assert line == 'error: .venv/bin/python does not run: remove .venv and start again'


def test_compile_ends_with_what_stops_setup_py(tmp_path: Path) -> None:
    interpreter(tmp_path, '*"import setup"*) echo "error: broken" >&2; exit 1 ;;')
    assert error_of(run('./compile.sh', VIRTUAL_ENV=str(tmp_path))) == 'error: broken'


@pytest.mark.parametrize('warning, reason', [
    ('', 'No matching distribution found for ninja>=1.11'),
    ('WARNING: Retrying (Retry(total=0)) after connection broken by NewConnectionError: /simple/ninja/',
     'it cannot reach its index: check the network, or set PIP_INDEX_URL '
     '(No matching distribution found for ninja>=1.11)'),
])
def test_compile_says_why_pip_failed(warning: str, reason: str, tmp_path: Path) -> None:
    message = f'{warning}\nERROR: No matching distribution found for ninja>=1.11'
    interpreter(tmp_path, '*mmdet*) echo None ;;', '*up_to_date*) echo False ;;',
                '*missing*) echo "ninja>=1.11" ;;', f'*"pip install"*) echo "{message}" >&2; exit 1 ;;')
    done = run('./compile.sh', VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f'error: pip could not install the requirements: {reason}'
