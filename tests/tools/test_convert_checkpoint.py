from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdet.checkpoint import load_file

TOOL = 'tools/convert_checkpoint.py'


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of 2019: a pickle, no zip file; three classes of which the first is background."""
    weights = {
        'bbox_head.fc_cls.bias': torch.arange(3),
        'bbox_head.fc_reg.bias': torch.arange(12),
        'backbone.layer2.0.conv2_offset.bias': torch.arange(18),
    }
    content = dict(meta=dict(epoch=12, CLASSES=('a_b', 'c')), state_dict=weights, optimizer=dict(state={}))
    torch.save(content, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    return tmp_path / 'old.pth'


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_file_of_2019_is_converted(run_toy: Callable, old: Path, tmp_path: Path, suffix: str) -> None:
    done = run_toy(TOOL, old, f'out/new.{suffix}')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('is recognised: 2019 format') == 1
    assert f'out/new.{suffix}: 3 tensors, which want the numerics of 2019\n' in done.stdout
    content = load_file(tmp_path / 'out' / f'new.{suffix}')
    assert content['meta']['legacy_2019'] is True and content['meta']['epoch'] == 12
    assert tuple(content['meta']['dataset_meta']['classes']) == ('a b', 'c')
    assert {name: value.tolist() for name, value in content['state_dict'].items()} == {
        'roi_head.bbox_head.fc_cls.bias': [1, 2, 0],
        'roi_head.bbox_head.fc_reg.bias': list(range(4, 12)),
        'backbone.layer2.0.conv2.conv_offset.bias': list(range(18)),
    }
    assert content.keys() == {'meta', 'state_dict'}


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['old.pth', 'old.pth'], 'old.pth would overwrite the checkpoint that it is made from'),
        (['old.pth', 'new.bin'], 'new.bin must end in .pth or .safetensors'),
        (['no.pth', 'new.pth'], 'checkpoint no.pth does not exist'),
        (['file://[bad/x.pth', 'new.pth'], 'file://[bad/x.pth is no address: '),
        (['planted.pth', 'new.pth'], 'checkpoint planted.pth was refused: it holds builtins.range'),
    ],
)
def test_errors_are_one_line(
    error_of_toy: Callable, old: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    torch.save(dict(state_dict={}, meta=range(3)), tmp_path / 'planted.pth')
    before = old.read_bytes()
    error = error_of_toy(TOOL, *arguments)
    assert error.startswith(f'error: {message}'.replace('builtins.range', 'range'))
    assert error.count('\n') == 1
    assert old.read_bytes() == before and not (tmp_path / 'new.pth').exists()


def test_an_address_of_the_file_itself(error_of_toy: Callable, old: Path) -> None:
    (odd := old.with_name('a%20b.pth')).write_bytes(old.read_bytes())
    for source, target in ((old.as_uri(), old), (odd, odd)):
        assert error_of_toy(TOOL, source, target) == (
            f'error: {target} would overwrite the checkpoint that it is made from: give another name\n')


def test_a_trusted_file_is_converted(run_toy: Callable, tmp_path: Path) -> None:
    meta = dict(epoch=3, mean=np.zeros(2), path=tmp_path)
    content = dict(state_dict={'roi_head.x': torch.ones(1)}, meta=meta, other=range(3))
    torch.save(content, tmp_path / 'e.pth')
    done = run_toy(TOOL, 'e.pth', 'new.pth', '--trust-checkpoint')
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('left out of meta, being no plain types: path\n')
    assert load_file(tmp_path / 'new.pth')['meta'] == dict(epoch=3, mean=[0, 0])
