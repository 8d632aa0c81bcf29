"""How mmdet.checkpoint reads, fetches and writes files: no code in them runs, none is left half written."""

import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import string
import sys
import types
import warnings
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import torch
import torchvision
from torch import Tensor

from mmdet.utils.files import replace_file, write_file


class _Discarded:
    """Stands in for mmengine's HistoryBuffer: takes any state and keeps none."""

    def __new__(cls, *args: object) -> '_Discarded':
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _no_attribute(*args: object) -> None:
    """Stands in for ``getattr``, which a pickle could use to reach any function."""


def _latin1(text: str, encoding: str = 'latin1') -> bytes:
    """Stands in for ``codecs.encode``, by which Python 3 writes bytes in old pickles."""
    return text.encode('latin1')


def _numpy_function(name: str) -> Any:
    core: Any = getattr(np, '_core', None) or np.core  # NumPy 2, NumPy 1
    return getattr(core.multiarray, name)


# What checkpoints of mmengine (the log history in `message_hub`) and of 2019 (numbers of NumPy in `meta`)
# hold beside plain types and tensors. Allowed while one file is read, not for the whole process.
_STAND_INS: list[Any] = [
    (_Discarded, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_no_attribute, 'builtins.getattr'),
    (_no_attribute, '__builtin__.getattr'),
    (_latin1, '_codecs.encode'),
    *((_numpy_function(name), f'numpy.{core}.multiarray.{name}')
      for name in ('scalar', '_reconstruct') for core in ('core', '_core')),
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
]
# What a pickle of NumPy's arrays and numbers imports.
NUMPY_NAMES = r'_codecs\.encode|numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))'
_HARMLESS = re.compile(r'collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.\w+Storage|torch\.Size|'
                       + NUMPY_NAMES)


def read_file(path: Path, map_location: str | torch.device = 'cpu', trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint; a bare state dict comes under ``state_dict``.

    Raises:
        FileNotFoundError: ``path`` is no file.
        ValueError: it is empty, cut off, no checkpoint, or holds something besides plain types and tensors
            (with ``trust`` that is loaded, and may run code).
    """
    require_file(path)
    try:
        if path.suffix == '.safetensors':
            return _read_safetensors(path, map_location)
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # the error says enough
            loaded = torch.load(path, map_location=map_location, weights_only=not trust)
    except pickle.UnpicklingError as error:
        found = re.search(r'(?:GLOBAL|class) ([\w.<>\' ]+?) (?:was|whose)', str(error))
        named = found[1] if found else ', '.join(types_named_in(path))
        if named and not trust:
            raise ValueError(f'checkpoint {path} was refused: it holds {named}, which could run code when '
                             'loaded; if you trust its origin, --trust-checkpoint loads it; with that '
                             'flag tools/convert_checkpoint.py makes a plain file of it') from None
        raise ValueError(f'{path} is not a checkpoint, or is damaged') from None
    except (PermissionError, MissingPackage):
        raise
    except Exception as error:  # each reader of torch raises its own types on damaged files
        reason = 'the file is empty' if path.stat().st_size == 0 else str(error).splitlines()[:1]
        reason = reason if isinstance(reason, str) else (reason or [type(error).__name__])[0][:100]
        if trust and isinstance(error, (ImportError, AttributeError)):
            raise ValueError(f'{path} holds a type that is not installed here: {reason}') from None
        raise ValueError(f'{path} is not a checkpoint, or is damaged: {reason}') from None
    if isinstance(loaded, dict) and _is_state_dict(loaded.get('state_dict')):
        return loaded
    if _is_state_dict(loaded) and loaded:
        return {'state_dict': loaded}
    raise ValueError(f'{path} is not a checkpoint: it holds a {type(loaded).__name__} without a state_dict '
                     'of tensors')


def require_file(path: Path) -> None:
    """Raise FileNotFoundError if a checkpoint is no file."""
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} {"is a folder" if path.is_dir() else "does not exist"}')


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())


def types_named_in(path: Path) -> list[str]:
    """What the pickle in a file would import, less the harmless; read off without unpickling it.

    torch names what it refuses only in the versions of pickle that it knows.
    """
    names: dict[str, None] = {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickled = b''.join(archive.read(name) for name in archive.namelist() if name.endswith('.pkl'))
        else:
            pickled = path.read_bytes()
        stream = io.BytesIO(pickled)
        for _ in range(5):  # torch's old format: number, version, system, content, keys; then the numbers
            for name in _imports_of(stream):
                names[name] = None
    except Exception:  # not a pickle from here on; it raises anything, the file is anyone's
        pass
    return [name for name in names if not _HARMLESS.fullmatch(name)]


def _imports_of(pickled: io.BytesIO) -> Iterator[str]:
    strings: list[str] = []
    memo: dict[int, Any] = {}
    top: Any = None  # of the stack, if that is a string
    argument: Any  # str or int, as the opcode wants
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ('GLOBAL', 'INST'):
            yield argument.replace(' ', '.')
        elif opcode.name == 'STACK_GLOBAL':
            yield '.'.join(strings[-2:])
        if opcode.name == 'MEMOIZE' or 'PUT' in opcode.name:
            memo[len(memo) if argument is None else argument] = top
            continue
        top = memo.get(argument) if 'GET' in opcode.name else argument
        if isinstance(top, str):
            strings.append(top)


class MissingPackage(ValueError):
    """An optional package is not installed."""


def _safetensors() -> types.ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise MissingPackage('.safetensors files need a package more: pip install safetensors') from None
    return safetensors


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    with _safetensors().safe_open(path, 'pt', device=str(map_location)) as file:
        try:
            meta = json.loads((file.metadata() or {}).get('meta', '{}'))
        except ValueError:  # of another program
            meta = {}
        return dict(meta=meta, state_dict={name: file.get_tensor(name) for name in file.keys()})


def find_checkpoint(folder: str | Path) -> str | None:
    """What a training in ``folder`` wrote last; None where there is nothing.

    The file that ``last_checkpoint`` names, or else the ``epoch_N.pth`` or ``iter_N.pth`` with the highest N.
    """
    note = Path(folder, 'last_checkpoint')
    if note.is_file():
        last = Path(note.read_text().strip())
        for path in (Path(folder, last.name), last):  # the folder may have moved
            if path.is_file():
                return str(path)
    numbered = [(int(found[1]), str(path)) for path in Path(folder).glob('*.pth')
                if (found := re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem))]
    return max(numbered)[1] if numbered else None


def local_file(source: str) -> Path:
    """The file of a path, URL or name of a backbone; fetched into torch's cache where it is not there.

    The hash in a URL's name (``r50-1a2b3c4d.pth``: how its SHA-256 begins) is checked. Without one nothing
    tells whether the file in the cache is the same, and it is fetched anew.

    Args:
        source: a path; ``http://``, ``https://`` or ``file://``; ``torchvision://resnet50`` (torchvision's
            first ImageNet weights); ``open-mmlab://resnext101_32x4d`` (mmengine knows where they are).

    Raises:
        FileNotFoundError: it cannot be fetched.
        ValueError: unknown name or kind of address, or what was fetched is another file.
    """
    scheme, separator, name = source.partition('://')
    if not separator:
        return Path(source)
    if scheme in ('http', 'https', 'file'):
        return _fetch(source, trust_cache=False)
    if scheme in ('torchvision', 'modelzoo'):
        return _fetch(_torchvision_url(source, name))
    if scheme in ('open-mmlab', 'openmmlab'):
        url = _openmmlab_url(source, name)
        return _fetch(url) if '://' in url else Path(url)
    raise ValueError(f'{source}: give a path, or an address that begins with https://, http://, file://, '
                     'torchvision:// or open-mmlab://')


def _torchvision_url(source: str, name: str) -> str:
    names = torchvision.models.list_models(torchvision.models, include='res*')
    if name not in names:
        raise ValueError(f'{source}: torchvision has no such network; it has {", ".join(names)}')
    return torchvision.models.get_model_weights(name)['IMAGENET1K_V1'].url


def _openmmlab_url(source: str, name: str) -> str:
    from mmengine.runner import checkpoint as loader

    names = loader.get_external_models()  # with the user's own, $MMENGINE_HOME/open_mmlab.json
    name = loader.get_deprecated_model_names().get(name, name)
    if name not in names:
        raise ValueError(f'{source}: mmengine knows no such weights; it knows {", ".join(names)}')
    place = names[name]
    return place if '://' in place else os.path.join(loader._get_mmengine_home(), place)


def _fetch(url: str, trust_cache: bool = True) -> Path:
    try:
        url = quote(url, safe=string.punctuation)  # of letters that are not ASCII
        name = PurePosixPath(unquote(urlsplit(url).path)).name
    except ValueError as error:
        raise ValueError(f'{url} is no address: {error}') from None
    if not name:
        raise ValueError(f'{url} names no file')
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    found = re.search(r'-([0-9a-f]{8,64})\.\w+$', path.name)
    digest = found[1] if found else None
    certain = trust_cache or digest is not None and not digest.isdecimal()
    if path.is_file() and (trust_cache or digest and _sha256(path).startswith(digest)):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest, progress=sys.stderr.isatty())
    except (OSError, HTTPException) as error:
        reason = str(getattr(error, 'reason', error)).partition('\n')[0]
        # Without a hash nothing would tell that the file there is the one that is meant.
        instead = f'put the file at {path}' if certain else 'fetch it by other means and give its path'
        raise FileNotFoundError(f'cannot fetch {url} ({reason}): {instead}') from None
    except RuntimeError as error:  # `invalid hash value (expected "...", got "...")`
        hint = '' if certain else '; if that is a date, fetch the file and give its path'
        raise ValueError(f'{url} is not the file that its name promises: {error}{hint}') from None
    return path


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write ``checkpoint`` to ``path``; a process that dies on the way leaves the file of before whole.

    A ``.safetensors`` file takes ``state_dict`` and, as JSON in its header, ``meta``.

    Raises:
        TypeError: a value is neither a plain type nor a tensor.
        OSError: the file cannot be written (full disk, no permission).
        MissingPackage: safetensors is not installed.
    """
    path = Path(path)
    content = plain(checkpoint, '')

    def write(file: Any) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's zip writer hides the system's error
            raise OSError(f'cannot write {path}: {str(error).splitlines()[0]}') from error

    if path.suffix == '.safetensors':
        # Copied, as it takes no tensors that share memory.
        weights = {name: value.clone(memory_format=torch.contiguous_format)
                   for name, value in content['state_dict'].items()}
        header = dict(format='pt', meta=json.dumps(content.get('meta', {}), default=repr))
        data = _safetensors().torch.save(weights, header)
        write_file(path, data)
    else:
        replace_file(path, write)


def plain(value: Any, key: str) -> Any:
    """``value`` with tensors on the CPU, NumPy's types as Python's, containers as plain types.

    Raises:
        TypeError: it holds, under ``key``, something else.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), key)
    if isinstance(value, dict):
        return {plain(k, key): plain(v, f'{key}.{k}') for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v, f'{key}[{i}]') for i, v in enumerate(value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f'a checkpoint holds plain types and tensors only, but {key.lstrip(".")} is a '
                    f'{type(value).__name__}')
