"""The toy training of toy_config.py."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet.engine.runner import DetectionRunner
from mmdet.utils.config import load_config

HERE = Path(__file__).parent
_numbers = itertools.count()


@pytest.fixture
def toy_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Makes a config of the toy training: seed 3, in ``work_dir`` (in tmp_path), with other options."""
    monkeypatch.syspath_prepend(HERE)

    def make(work_dir: str = 'work', **options: object) -> Config:
        cfg = load_config(
            HERE / 'toy_config.py', {key.replace('__', '.'): value for key, value in options.items()}
        )
        cfg.work_dir = str(tmp_path / work_dir)
        cfg.setdefault('randomness', dict(seed=3))
        cfg.experiment_name = f'toy{next(_numbers)}'  # mmengine keeps loggers by name and second
        return cfg

    return make


@pytest.fixture
def toy_runner(toy_config: Callable[..., Config]) -> Callable[..., DetectionRunner]:
    """Makes the runner of such a config."""
    return lambda *args, **options: DetectionRunner.from_cfg(toy_config(*args, **options))
