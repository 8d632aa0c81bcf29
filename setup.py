"""Build the package with its one extension, `mmdet._C`: C++ always, CUDA where a compiler for it is found.

Environment: `CUDA_HOME` (toolkit to use), `FORCE_CUDA=1` (build CUDA or fail), `TORCH_CUDA_ARCH_LIST` (GPU
architectures), `MAX_JOBS` (parallel compilations). `compile.sh` asks the functions below what to install.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# Distributions with the same import name that serve as well where somebody has them already.
ALTERNATIVES = {
    'mmengine': ('onedl-mmengine',),
    'mmcv-lite': ('mmcv', 'onedl-mmcv'),
    'opencv-python-headless': ('opencv-contrib-python-headless', 'opencv-contrib-python'),
}


def installed(name: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> list[int]:
    """Numbers of a version's release part: '2.15.0+cpu' -> [2, 15, 0]."""
    return [int(part) for part in re.findall(r'\d+', version.split('+')[0])]


def requirements() -> list[str]:
    """Lines of requirements.txt, under the name of an accepted alternative where that is installed."""
    lines = [line.split('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()]
    found = []
    for name, bound in (line.split('>=') for line in lines if line):
        names = [name, *ALTERNATIVES.get(name, ())]
        found.append(f'{next(filter(installed, names), name)}>={bound}')
    return found


def pyproject() -> dict:
    """Content of pyproject.toml."""
    import tomllib
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def build_requirements() -> list[str]:
    """What a build needs, for which pip is told not to make an environment of its own."""
    return pyproject()['build-system']['requires']


def test_requirements() -> list[str]:
    """What the tests need beside all that: the extra `test`."""
    return pyproject()['project']['optional-dependencies']['test']


def missing(lines: list[str]) -> list[str]:
    """Those of some requirements that the running interpreter's environment does not meet."""
    def met(name: str, bound: str) -> bool:
        version = installed(name)
        return version is not None and release(version) >= release(bound)
    return [line for line in lines if not met(*line.split('>='))]


def installed_editable() -> bool:
    """Whether this checkout is installed in editable mode with its present version and requirements."""
    # Not by metadata.distribution(), which would find the build's egg-info in the current folder.
    for dist in metadata.distributions(name='gcnet-detection', path=[sysconfig.get_path('purelib')]):
        origin = json.loads(dist.read_text('direct_url.json') or '{}')
        needed = [line for line in dist.requires or [] if 'extra ==' not in line]
        return (origin.get('url') == ROOT.as_uri() and origin.get('dir_info', {}).get('editable', False)
                and dist.version == package_version() and needed == requirements())
    return False


def fingerprint() -> str:
    """Hash of what the built extension depends on: sources, torch, interpreter, compilers, GPUs, settings."""
    state = [sys.prefix, sys.version, installed('torch'), shutil.which('nvcc')]
    state += sorted(glob('/dev/nvidia[0-9]*'))
    state += [os.environ.get(name) for name in (
        'CXX', 'CUDA_HOME', 'CUDA_VISIBLE_DEVICES', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST')]
    sources = sorted(path for path in (ROOT / 'mmdet/ops/csrc').rglob('*') if path.is_file())
    state += [(str(path.relative_to(ROOT)), path.read_bytes()) for path in (Path(__file__), *sources)]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def up_to_date() -> bool:
    """Whether the last set-up, which left its fingerprint in build/, still stands."""
    stamp = ROOT / 'build' / 'fingerprint'
    return (stamp.exists() and stamp.read_text().strip() == fingerprint() and any(ROOT.glob('mmdet/_C.*'))
            and not missing(requirements()) and not installed('opencv-python') and installed_editable())


def package_version() -> str:
    """`mmdet.__version__`, read without importing the package."""
    return re.findall(r"^__version__ = '(.+)'", (ROOT / 'mmdet/__init__.py').read_text(), re.M)[0]


def nvcc_problem(home: Path) -> str | None:
    """Why the nvcc under a toolkit folder cannot build for this torch; None when it can."""
    import torch
    nvcc = home / 'bin' / 'nvcc'
    try:
        text = subprocess.run([nvcc, '--version'], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 'it does not run'
    found = re.search(r'release (\d+)\.\d+', text)
    if found is None or found[1] != torch.version.cuda.split('.')[0]:
        what = found[0] if found else 'an unknown release'
        return f'it is {what}, while torch was built with CUDA {torch.version.cuda}'
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'empty.cu')
        source.touch()
        command = [nvcc, '-std=c++20', '-c', source, '-o', f'{source}.o']
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:  # mostly: the host compiler is too new for it
        return f'it cannot compile: {(run.stderr.strip() or "no message").splitlines()[0]}'
    return None


def toolkit_of(nvcc: str) -> Path:
    """Folder of the toolkit that an nvcc belongs to, which may be a wrapper script or a link to it."""
    run = subprocess.run([nvcc, '--dryrun', '-x', 'cu', '-c', os.devnull], capture_output=True, text=True)
    top = re.search(r'^#\$ TOP=(.+)$', run.stderr, re.M)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def pip_cuda_home() -> Path:
    """Folder that the CUDA wheels of torch's own major version share, beside the torch package."""
    import torch
    return Path(torch.__file__).parents[1] / 'nvidia' / f'cu{torch.version.cuda.split(".")[0]}'


@functools.cache
def find_cuda_home() -> Path | None:
    """Toolkit to compile CUDA with: CUDA_HOME, then nvcc on PATH, then the compiler installed from pip.

    One that has an nvcc which cannot be used is passed over, with a line that says why.
    """
    import torch
    if torch.version.cuda is None:
        return None
    nvcc = shutil.which('nvcc')
    homes = [Path(os.environ['CUDA_HOME'])] if os.environ.get('CUDA_HOME') else []
    homes += [toolkit_of(nvcc)] if nvcc else []
    for home in dict.fromkeys([*homes, pip_cuda_home()]):
        if not (home / 'bin' / 'nvcc').exists():
            continue
        problem = nvcc_problem(home)
        if problem is None:
            return home
        print(f'note: {home}/bin/nvcc is not used: {problem}', file=sys.stderr)
    return None


def missing_cuda_compiler() -> list[str]:
    """What to install from pip for a CUDA compiler; empty when there is one, or none is wanted."""
    import torch
    forced = os.environ.get('FORCE_CUDA') == '1'
    if torch.version.cuda is None and forced:
        sys.exit(f'error: FORCE_CUDA=1, but torch {torch.__version__} has no CUDA: install one that has')
    if torch.version.cuda is None or not (forced or torch.cuda.is_available()) or find_cuda_home():
        return []
    if release(torch.version.cuda) < [13]:
        sys.exit(f'error: no nvcc for this torch (CUDA {torch.version.cuda}) was found: set CUDA_HOME to its '
                 'toolkit, or install a torch that is built with CUDA 13')
    # All three at one minor version: ptxas refuses what a newer nvvm writes.
    names = ('nvidia-cuda-nvcc', 'nvidia-nvvm', 'nvidia-cuda-crt')
    return [f'{name}=={torch.version.cuda}.*' for name in names]


def check_torch() -> None:
    """Exit with one line unless torch >= 2.11 can be imported."""
    try:
        import torch
    except ImportError:
        sys.exit('error: this build sees no torch: run `pip install --no-build-isolation .`, with that flag, '
                 'so that it sees the one that is installed (./compile.sh installs torch as well)')
    if release(torch.__version__) < [2, 11]:
        sys.exit(f'error: torch {torch.__version__} is installed, 2.11 or later is needed: '
                 'run `pip install --upgrade torch torchvision`')


def extension():
    """The setuptools extension, with every source under mmdet/ops/csrc."""
    import torch
    compiler = missing_cuda_compiler()
    if compiler:
        sys.exit(f'error: no CUDA compiler: run ./compile.sh, or `pip install {" ".join(compiler)}`; '
                 'for C++ alone hide the GPU with CUDA_VISIBLE_DEVICES=')
    home = find_cuda_home()
    if home:
        os.environ['CUDA_HOME'] = str(home)  # torch reads it when cpp_extension is imported
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    def sources(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f'mmdet/ops/csrc/{pattern}'))

    # ATen's parallel_for is a header with OpenMP pragmas: without the flag it runs on one thread.
    openmp = ['-fopenmp'] if sys.platform == 'linux' else []
    simd = []
    if torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512'):
        # Without the macros at::vec has plain loops; contraction would round sums of products elsewhere anew.
        simd = ['-mavx2', '-mfma', '-mf16c', '-DCPU_CAPABILITY=AVX2', '-DCPU_CAPABILITY_AVX2']
        simd += ['-ffp-contract=off']
    cxx = ['-O3', '-std=c++20', '-Wall', '-Wno-unknown-pragmas', *openmp, *simd]
    nvcc = ['-O3', '-std=c++20', *(f'-Xcompiler={flag}' for flag in openmp)]
    flags = {'cxx': cxx, 'nvcc': nvcc}
    common = dict(extra_compile_args=flags, extra_link_args=openmp, py_limited_api=True,
                  depends=sources('**/*.h') + sources('**/*.cuh'))
    files = sources('*.cpp') + sources('cpu/*.cpp')
    if not home:
        return CppExtension('mmdet._C', files, **common)

    # Turing and everything later, whatever GPU is here, as a checkout may be shared by machines with others:
    # code for 8.0 runs on 8.x, the PTX of 9.0 on what comes after.
    os.environ.setdefault('TORCH_CUDA_ARCH_LIST', '7.5;8.0;9.0+PTX')
    cuda = CUDAExtension('mmdet._C', files + sources('cuda/*.cu'), **common)
    runtime = next(iter(sorted((pip_cuda_home() / 'lib').glob('libcudart.so.*'))), None)
    if runtime:
        # Link what torch runs with; its wheel has no libcudart.so, the name that -lcudart looks for.
        cuda.libraries = [f':{runtime.name}' if name == 'cudart' else name for name in cuda.libraries]
        cuda.library_dirs.append(str(runtime.parent))
    return cuda


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f'error: Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}')
    check_torch()
    if lacking := missing(build_requirements()):
        sys.exit(f'error: this build needs {" and ".join(lacking)}: run `pip install '
                 f'{" ".join(repr(line) for line in lacking)}` (./compile.sh installs them as well)')
    os.chdir(ROOT)
    os.environ.setdefault('MAX_JOBS', str(os.cpu_count()))
    module = extension()

    import torch
    from setuptools import Command, find_packages, setup
    from torch.utils.cpp_extension import BuildExtension

    class BuildInOnePlace(BuildExtension):
        """Keeps its objects, also for `pip install -e`, which would take a new folder and compile all again.

        One folder a torch, so that objects built against another one are never linked.
        """

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = f'build/torch-{torch.__version__}'

    class Develop(Command):
        """`setup.py develop`, which setuptools runs as an isolated build, where torch is missing."""

        user_options: list[tuple[str, str | None, str]] = [('no-deps', 'N', 'do not install requirements')]
        boolean_options = ['no-deps']

        def initialize_options(self) -> None:
            self.no_deps = False

        def finalize_options(self) -> None:
            pass

        def run(self) -> None:
            subprocess.check_call([sys.executable, '-m', 'pip', 'install', '--no-build-isolation',
                                   *(['--no-deps'] if self.no_deps else []), '-e', '.'])

    setup(
        version=package_version(),
        packages=find_packages(include=['mmdet', 'mmdet.*']),
        include_package_data=False,  # by default part of the C++ sources would be installed
        install_requires=requirements(),
        ext_modules=[module],
        cmdclass={'build_ext': BuildInOnePlace, 'develop': Develop},
        options={'bdist_wheel': {'py_limited_api': 'cp311'}},
    )


if __name__ == '__main__':
    main()
