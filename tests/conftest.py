"""Marks and fixtures of all tests, and the rule that no test is left out unseen.

A test is skipped by its mark alone, when it is collected: `slow` without --slow, `cuda` without a GPU,
`onednn` without oneDNN's blocks, `shared` without its folder. Where `CI=true`, any other skip (pytest.skip,
importorskip) is a failure.
"""
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(os.environ.get('GCNET_SHARED', Path(__file__).resolve().parents[2] / 'shared'))
EXPECTED = 'left out: '
IN_CI = os.environ.get('CI') == 'true'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')


def reason_to_skip(item: pytest.Item) -> str | None:
    """Why a test cannot run here, by its marks."""
    if item.get_closest_marker('slow') and not item.config.getoption('--slow'):
        return 'slow, runs with --slow'
    if item.get_closest_marker('cuda') and not torch.cuda.is_available():
        return 'needs a GPU'
    if item.get_closest_marker('onednn'):
        from mmdet.models.layers.conv import AVAILABLE  # takes seconds, unless a test had it
        if not AVAILABLE:
            return 'needs an x86 CPU with AVX2, and oneDNN'
    for mark in item.iter_markers('shared'):
        for name in mark.args or ('',):
            if not (SHARED / name).is_dir():
                return f'{SHARED / name} is not there (environment variable GCNET_SHARED)'
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = reason_to_skip(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=EXPECTED + reason))


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip that no mark announced into a failure, in CI."""
    if IN_CI and report.skipped and not hasattr(report, 'wasxfail') and EXPECTED not in str(report.longrepr):
        report.outcome = 'failed'
        report.longrepr = f'skipped for a reason that no mark announces: {report.longrepr}'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    refuse_skip(report)
    return report


@pytest.fixture(scope='session')
def shared_dir() -> Path:
    """Folder of the reference material; a test that takes it is marked `shared`."""
    return SHARED


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fixed_random_state() -> Iterator[None]:
    """Every test starts from the same random state and thread count, and leaves them as they were."""
    numpy_state, python_state, threads = np.random.get_state(), random.getstate(), torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        yield
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    torch.set_num_threads(threads)
