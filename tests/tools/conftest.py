"""The command-line tools on the toy of tests/engine."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from mmdet.engine.launch import run_tool

ROOT = Path(__file__).resolve().parents[2]
# What the tools take from the environment: that of a test is its own, also inside a job.
TAKEN = {'OMP_NUM_THREADS', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE',
         'NNODES', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT',
         'GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS', 'PY_ARGS'}


@pytest.fixture
def run_toy(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a tool (``tools/train.py``) in an empty folder, with environment variables."""

    def run(tool: str, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT / 'tests' / 'engine'), str(ROOT), os.environ.get('PYTHONPATH', '')])
        clean = {key: value for key, value in os.environ.items() if key not in TAKEN}
        program = [sys.executable, '-W', 'error::FutureWarning'] if tool.endswith('.py') else []
        return subprocess.run(
            [*program, str(ROOT / tool), *map(str, arguments)],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=300,
            env=clean | dict(PYTHONPATH=path, PYTHON=sys.executable) | env,
        )

    return run


@pytest.fixture
def error_of_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Runs a tool that has to fail, in this process, which is faster; returns what it says on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tests' / 'engine')
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        monkeypatch.setenv(name, '1')

    def run(tool: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, 'argv', [str(ROOT / tool), *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(Path(tool).stem, ROOT / tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for kept in (DefaultScope, MMLogger, MessageHub, Visualizer):
            kept._instance_dict.clear()  # mmengine keeps them by config and second
        with pytest.raises(SystemExit) as end:
            run_tool(module.main)
        assert end.value.code == 1
        error = capsys.readouterr().err
        assert 'Traceback' not in error
        return error

    return run
