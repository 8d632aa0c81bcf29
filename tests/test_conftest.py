"""The marks, and that CI does not let a test leave itself out."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = '''
import random
import numpy as np
import pytest
import torch

pytest.importorskip('json')

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.shared('there')
def test_shared(shared_dir): assert (shared_dir / 'there').is_dir()

@pytest.mark.shared('there', 'elsewhere')
def test_missing_folder(): raise AssertionError

@pytest.mark.parametrize('repeat', [0, 1])
def test_random_state(repeat):
    torch.set_num_threads(3)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == EXPECTED

@pytest.mark.onednn
def test_onednn(): raise AssertionError

def test_device(device): torch.zeros(1, device=device)

def test_leaves_itself_out(): pytest.skip('no reason')
'''
FIRST_DRAWS = '(0.49625658988952637, 0.5488135039273248, 0.8444218515250481)'


@pytest.mark.parametrize('ci, slow, counts', [
    ('', '', {'passed': 4, 'failed': 0}),
    ('true', '--slow', {'passed': 5, 'failed': 1}),
])
def test_only_marks_leave_tests_out(ci: str, slow: str, counts: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / 'there').mkdir()
    (tmp_path / 'conftest.py').write_text(Path(__file__).with_name('conftest.py').read_text())
    (tmp_path / 'test_it.py').write_text(TESTS.replace('EXPECTED', FIRST_DRAWS))
    command = [sys.executable, '-m', 'pytest', '-rs', '-p', 'no:cacheprovider', *slow.split(), str(tmp_path)]
    env = os.environ | {'CI': ci, 'GCNET_SHARED': str(tmp_path), 'CUDA_VISIBLE_DEVICES': '',
                        'ATEN_CPU_CAPABILITY': 'default'}  # neither GPU nor AVX2
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path).stdout
    last = out.splitlines()[-1]
    assert f'{counts["passed"]} passed' in last
    assert (f'{counts["failed"]} failed' in last) == (counts['failed'] > 0)
    assert ('slow, runs with --slow' in out) == (not slow)
    assert f'{tmp_path / "elsewhere"} is not there' in out
    assert 'needs a GPU' in out and 'needs an x86 CPU' in out
    assert ('skipped for a reason that no mark announces' in out) == (ci == 'true')


def test_a_module_cannot_leave_itself_out_in_ci(tmp_path: Path) -> None:
    (tmp_path / 'conftest.py').write_text(Path(__file__).with_name('conftest.py').read_text())
    (tmp_path / 'test_it.py').write_text('import pytest\npytest.importorskip("nowhere")\n')
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', str(tmp_path)]
    env = os.environ | {'CI': 'true'}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and '1 error' in done.stdout.splitlines()[-1]
