"""No code in a file runs, whatever the format; addresses and hashes; safetensors."""

import argparse
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import sys
import tarfile
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch

from mmdet import checkpoint as ckpt
from mmdet.checkpoint_files import local_file

STATE = OrderedDict(w=torch.arange(3.0))


class Planted:
    """Unpickles to the result of a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def as_zip(content: dict, protocol: int) -> bytes:
    torch.save(content, stream := io.BytesIO(), pickle_protocol=protocol)
    return stream.getvalue()


def as_legacy(content: dict, protocol: int) -> bytes:
    options = dict(pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    torch.save(content, stream := io.BytesIO(), **options)
    return stream.getvalue()


def as_pickle(content: dict, protocol: int) -> bytes:
    return pickle.dumps(content, protocol)


def as_tar(content: object) -> bytes:
    """The format of PyTorch before 0.1.11."""
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode='w') as tar:
        for name in ('storages', 'tensors', 'pickle'):
            header, data = tarfile.TarInfo(name), pickle.dumps(content)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return stream.getvalue()


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('write', [as_zip, as_legacy, as_pickle])
@pytest.mark.parametrize('place', ['top', 'meta', 'state_dict', 'key'])
def test_planted_code_does_not_run(tmp_path: Path, protocol: int, write: Callable, place: str) -> None:
    victim, path = tmp_path / 'victim', tmp_path / 'e.pth'
    planted = Planted(os.system, f'touch {victim}')
    content = dict(state_dict=dict(STATE), meta=dict(epoch=1))
    if place == 'top':
        content = planted
    elif place == 'meta':
        content['meta']['deep'] = [dict(a=(1, planted))]
    elif place == 'state_dict':
        content['state_dict']['w'] = planted
    else:
        content['meta'][planted] = 1
    path.write_bytes(write(content, protocol))

    with pytest.raises(ValueError) as error:
        ckpt.load_file(path)

    assert not victim.exists()
    assert str(error.value).startswith(f'checkpoint {path} was refused: it holds ')
    assert str(error.value).endswith(', which could run code when loaded; if you trust its origin, '
                                     '--trust-checkpoint loads it; with that flag '
                                     'tools/convert_checkpoint.py makes a plain file of it')
    # A bare pickle of a tensor is itself a call of torch's loader.
    assert re.search('posix.system|torch.storage._load_from_bytes', str(error.value))
    with suppress(ValueError):  # it need not be a checkpoint
        ckpt.load_file(path, trust=True)
    assert victim.exists()  # the plant is live


def test_planted_code_in_a_tar_file_does_not_run(tmp_path: Path) -> None:
    victim, path = tmp_path / 'victim', tmp_path / 'e.pth'
    path.write_bytes(as_tar(Planted(os.system, f'touch {victim}')))
    with pytest.raises(ValueError, match='weights_only=True.* with files saved in the legacy .tar format'):
        ckpt.load_file(path)
    assert not victim.exists()


@pytest.mark.parametrize('write', [as_zip, as_legacy])
@pytest.mark.parametrize('value', [argparse.Namespace(a=1), Path('a'), {1: range(3)}], ids=str)
def test_other_types_load_when_they_are_trusted(tmp_path: Path, write: Callable, value: object) -> None:
    path = tmp_path / 'e.pth'
    path.write_bytes(write(dict(state_dict=STATE, meta=dict(x=value)), 2))
    with pytest.raises(ValueError, match='it holds (argparse.Namespace|pathlib.PosixPath|range), which'):
        ckpt.load_file(path)
    assert ckpt.load_file(path, trust=True)['meta'] == dict(x=value)


def test_a_trusted_type_may_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType('lost')
    module.Lost = type('Lost', (), dict(__module__='lost'))
    monkeypatch.setitem(sys.modules, 'lost', module)
    (tmp_path / 'e.pth').write_bytes(as_legacy(dict(state_dict=STATE, meta=module.Lost()), 2))
    monkeypatch.delitem(sys.modules, 'lost')
    with pytest.raises(ValueError, match=r'e\.pth was refused: it holds lost\.Lost'):
        ckpt.load_file(tmp_path / 'e.pth')
    with pytest.raises(ValueError, match="holds a type that is not installed here: No module named 'lost'"):
        ckpt.load_file(tmp_path / 'e.pth', trust=True)


@pytest.mark.parametrize('write', [as_zip, as_legacy])
def test_numbers_of_numpy_and_bytes_are_harmless(tmp_path: Path, write: Callable) -> None:
    meta = dict(best=np.float64(0.5), epoch=np.int64(3), array=np.arange(2), raw=b'\xff')
    (tmp_path / 'e.pth').write_bytes(write(dict(state_dict=STATE, meta=meta), 2))
    loaded = ckpt.load_file(tmp_path / 'e.pth')
    assert loaded['meta']['array'].tolist() == [0, 1]
    assert (loaded['meta']['best'], loaded['meta']['epoch'], loaded['meta']['raw']) == (0.5, 3, b'\xff')
    assert torch.equal(loaded['state_dict']['w'], STATE['w'])


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'e.pth').write_bytes(as_zip(dict(state_dict=STATE), 2))
    monkeypatch.setattr(torch, 'load', Mock(side_effect=PermissionError(13, 'Permission denied')))
    with pytest.raises(PermissionError, match='Permission denied$'):
        ckpt.load_file(tmp_path / 'e.pth')


def test_what_is_allowed_is_allowed_for_one_file(tmp_path: Path) -> None:
    (tmp_path / 'e.pth').write_bytes(as_legacy(dict(state_dict=STATE, meta=dict(a=np.arange(2))), 2))
    before = set(torch.serialization.get_safe_globals())
    ckpt.load_file(tmp_path / 'e.pth')
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """``url`` serves the files of ``folder``; ``requests`` lists them; torch's cache is empty."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    (folder := tmp_path / 'served').mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: object) -> None:
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(
            url=f'http://127.0.0.1:{httpd.server_port}', folder=folder, requests=requests,
            cache=tmp_path / 'cache' / 'hub' / 'checkpoints')
        httpd.shutdown()


def serve(server: types.SimpleNamespace, template: str, value: float = 1) -> str:
    """Put a checkpoint where the server finds it; ``{}`` in its name becomes the hash."""
    data = as_zip(dict(state_dict={'w': torch.tensor([value])}), 2)
    name = template.format(hashlib.sha256(data).hexdigest()[:8])
    (server.folder / name).write_bytes(data)
    return name


def test_a_url_is_fetched_once(server: types.SimpleNamespace) -> None:
    name = serve(server, 'gc_20190602-{}.pth')
    for _ in range(2):
        loaded = ckpt.load_file(f'{server.url}/{name}?download=1')
        assert loaded['state_dict']['w'].tolist() == [1]
    assert len(server.requests) == 1
    (server.cache / name).write_bytes(b'damaged')
    assert ckpt.load_file(f'{server.url}/{name}')['state_dict']['w'].tolist() == [1]


def test_the_hash_in_a_name_is_checked(server: types.SimpleNamespace) -> None:
    name = serve(server, 'gc-01234567.pth')
    digest = hashlib.sha256((server.folder / name).read_bytes()).hexdigest()
    with pytest.raises(ValueError) as error:
        ckpt.load_file(f'{server.url}/{name}')
    assert '01234567' in str(error.value) and digest in str(error.value) and '\n' not in str(error.value)
    assert not list(server.cache.iterdir())


def test_a_url_without_a_name_is_an_error() -> None:
    with pytest.raises(ValueError, match='https://example.com names no file'):
        ckpt.load_file('https://example.com')


def test_a_url_without_a_hash_is_fetched_anew(server: types.SimpleNamespace) -> None:
    for value in (1, 2):
        name = serve(server, 'epoch_12.pth', value)
        assert ckpt.load_file(f'{server.url}/{name}')['state_dict']['w'].tolist() == [value]
    assert ckpt.load_file((server.folder / name).as_uri())['state_dict']['w'].tolist() == [2]


def test_addresses_that_are_none_and_odd_ones(tmp_path: Path, server: types.SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r'is no address: [^\n]+$'):
        local_file('http://[bad/x.pth')
    (tmp_path / '\xfc').mkdir()
    (path := tmp_path / '\xfc' / 'e.pth').write_bytes(b'x')
    assert local_file(f'file://{path}').read_bytes() == b'x'


def test_a_date_is_no_hash(server: types.SimpleNamespace) -> None:
    name = serve(server, 'model-20230101.pth', 1)
    with pytest.raises(ValueError, match='if that is a date, fetch the file and give its path$'):
        ckpt.load_file(f'{server.url}/{name}')


def test_a_url_that_is_not_there_is_one_line(server: types.SimpleNamespace) -> None:
    with pytest.raises(FileNotFoundError, match='cannot fetch .*/no-0a1b2c3d.pth .*: put the file at .*pth$'):
        ckpt.load_file(f'{server.url}/no-0a1b2c3d.pth')
    name = serve(server, 'no.pth')
    ckpt.load_file(f'{server.url}/{name}')
    (server.folder / name).unlink()  # what was fetched before may be another file of this name
    for absent in (name, 'no-20230101.pth'):
        with pytest.raises(FileNotFoundError, match=': fetch it by other means and give its path$'):
            ckpt.load_file(f'{server.url}/{absent}')
    with pytest.raises(ValueError, match='s3://a.pth: give a path, or an address that begins with https://'):
        ckpt.load_file('s3://a.pth')


def test_open_mmlab_names_are_resolved_by_mmengine(
    server: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    with pytest.raises(FileNotFoundError) as error:
        local_file('open-mmlab://resnext101_32x4d')
    assert '\n' not in str(error.value)
    assert f'put the file at {server.cache}/resnext101_32x4d-a5af3160.pth' in str(error.value)
    server.cache.mkdir(exist_ok=True, parents=True)
    (server.cache / 'resnext101_32x4d-a5af3160.pth').touch()
    assert local_file('openmmlab://resnext101_32x4d') == server.cache / 'resnext101_32x4d-a5af3160.pth'

    own = dict(mine=f'{server.url}/{serve(server, "mine-{}.pth")}', here='here.pth')
    (tmp_path / 'mmengine' / 'open_mmlab.json').write_text(json.dumps(own))
    assert ckpt.load_file('open-mmlab://mine')['state_dict']['w'].tolist() == [1]
    assert local_file('open-mmlab://here') == tmp_path / 'mmengine' / 'here.pth'
    with pytest.raises(ValueError, match='open-mmlab://none: mmengine knows no such weights; .*mine'):
        local_file('open-mmlab://none')


def test_safetensors_keep_weights_and_meta(tmp_path: Path) -> None:
    meta = dict(epoch=12, legacy_2019=True, dataset_meta=dict(classes=('a', 'b')), raw=b'x')
    state = dict(w=torch.arange(6.0).view(2, 3).t(), n=torch.tensor(3), half=torch.ones(2).half())
    ckpt.save_checkpoint(dict(state_dict=state, meta=meta), path := tmp_path / 'e.safetensors')
    loaded = ckpt.load_file(path)
    assert loaded['meta'] == meta | dict(raw="b'x'")
    assert {name: value.tolist() for name, value in loaded['state_dict'].items()} == {
        name: value.tolist() for name, value in state.items()}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match='e.safetensors is not a checkpoint, or is damaged'):
        ckpt.load_file(path)


def test_safetensors_of_shared_memory_and_of_other_programs(tmp_path: Path) -> None:
    weights = torch.arange(4.0)
    ckpt.save_checkpoint(dict(state_dict=dict(a=weights, b=weights[1:])), path := tmp_path / 'e.safetensors')
    assert ckpt.load_file(path)['state_dict']['b'].tolist() == [1, 2, 3]
    safetensors.torch.save_file(dict(a=weights), path, dict(meta='by hand'))
    assert ckpt.load_file(path)['meta'] == {}


def test_safetensors_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    (path := tmp_path / 'e.safetensors').touch()
    for use in (lambda: ckpt.load_file(path), lambda: ckpt.save_checkpoint(dict(state_dict={}), path)):
        with pytest.raises(ValueError, match='^.safetensors files need .*: pip install safetensors$'):
            use()
