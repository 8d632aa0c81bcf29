"""Loads a config file, with options, and refuses one that cannot mean what it says."""

import ast
import difflib
import os.path as osp
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.utils import import_modules_from_strings

from mmdet.utils.config_check import ConfigError, check_config, closest, find_problems, report
from mmdet.utils.config_schema import OLD_KEYS, RUNNER_KEYS

__all__ = ['ConfigError', 'check_config', 'load_config']


def load_config(path: str | Path, cfg_options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file and its ``_base_`` files, merge options over it and check the result.

    Args:
        path: a ``.py`` (or ``.json``, ``.yaml``) config file.
        cfg_options: ``{'model.backbone.depth': 18, 'train_dataloader.dataset.pipeline.2.prob': 0}``.

    Raises:
        FileNotFoundError: there is no such file; the message names the nearest one.
        ConfigError: the file or one of its bases cannot be read, a key is unknown (see
            ``check_config``), or a redefined helper variable does not reach the keys it stands for.
    """
    name = str(path)
    _require_file(name)
    options = dict(cfg_options or {})
    files: dict[str, _Source] = {}
    with _one_line_errors(name, files):
        _read_files(name, files)
    with _repaired_merge(), _one_line_errors(name, files):
        cfg = Config.fromfile(Path(name).expanduser())
        for key in [key for key, value in dict.items(cfg._cfg_dict) if isinstance(value, type)]:
            del cfg._cfg_dict[key]  # imported by the file; mmengine drops functions and modules alone
        _drop_empty_scope(cfg._cfg_dict)
        before = cfg.copy()
        cfg.merge_from_dict(options)
        imports = cfg.get('custom_imports')
        if imports and any(key.partition('.')[0] == 'custom_imports' for key in options):
            if not isinstance(imports, dict) or 'imports' not in imports:
                raise ConfigError(f'custom_imports={imports!r}: give custom_imports.imports=[MODULE,...]')
            import_modules_from_strings(**imports)  # those of the file are there
        helpers = {used for source in files.values() for used in source.used}
        lost = [problem for source in files.values() for problem in _lost_in_file(cfg, source, helpers)]
    set_names = {key.split('.')[0] for key in options}.union(*(source.assigned for source in files.values()))
    old = [f'{key}: a key of mmdetection 1.x and 2.x; here it is {OLD_KEYS[key]}'
           for key in sorted(set_names & OLD_KEYS.keys() - helpers)]
    report([*old, *lost, *_lost_options(cfg, before, options, helpers), *find_problems(cfg, helpers)], name)
    for key in OLD_KEYS.keys() & cfg.keys():  # a helper, which in a dumped config would be an old key
        del cfg._cfg_dict[key]
    return cfg


@dataclass
class _Source:
    """A config file as its syntax tree shows it: its bases, the names it assigns, and the names
    (of its own, or read from ``_base_``) whose value reaches a key of the runner."""

    bases: list[Path]
    assigned: set[str]
    used: set[str]


def _require_file(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_file():
        return
    if path.is_dir():
        raise FileNotFoundError(f'{name}: is a folder; give a config file')
    raise FileNotFoundError(f'{name}: no such config file{_hint_file(path)}')


def _hint_file(path: Path) -> str:
    """'; did you mean ...?' with the existing config nearest to a path, or nothing."""
    beside = {file.name: str(file) for file in path.parent.glob('*.py')}
    if match := difflib.get_close_matches(path.name, beside, 1):
        return f'; did you mean {beside[match[0]]}?'
    # From a checkout; an installed package has no configs.
    roots = (Path('configs'), Path(__file__).parents[2] / 'configs')
    files = {file.stem: str(file) for root in reversed(roots) for file in root.rglob('*.py')}
    match = difflib.get_close_matches(path.stem, files, 1, cutoff=0.5)
    return f'; did you mean {files[match[0]]}?' if match else ''


def _read_files(name: str, files: dict[str, _Source]) -> None:
    """Fill ``files`` with the Python config file ``name`` and, recursively, its bases, by absolute path."""

    def read(path: Path, shown: str, above: tuple[Path, ...]) -> None:
        if path in above:
            raise ConfigError(f'_base_ of {shown} leads back to itself')
        if path.suffix != '.py' or str(path) in files:
            return
        try:
            tree = ast.parse(path.read_text(encoding='utf-8'))
        except SyntaxError as error:
            where = '' if shown == name else f'{shown}, '
            raise ConfigError(f'{where}line {error.lineno}: {error.msg}') from error
        except (OSError, ValueError) as error:
            raise ConfigError(f'cannot read {shown}: {error}') from error
        source = files[str(path)] = _Source([], *_names(tree))
        for base in _bases(tree):
            if '::' in base:
                continue  # of another package; mmengine finds it
            base_path = Path(osp.abspath(path.parent / base))
            if not base_path.is_file():
                where = '' if shown == name else f' of {shown}'
                raise ConfigError(f'_base_ {base!r}{where} does not exist{_hint_file(base_path)}')
            source.bases.append(base_path)
            read(base_path, base, (*above, path))

    read(Path(osp.abspath(Path(name).expanduser())), name, ())


def _bases(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '_base_':
            try:
                bases = ast.literal_eval(node.value)
            except ValueError:  # computed: mmengine evaluates it
                return []
            bases = [bases] if isinstance(bases, str) else bases
            if not isinstance(bases, list | tuple) or not all(isinstance(base, str) for base in bases):
                raise ConfigError(f'_base_ = {bases!r}: expected a path or a list of paths')
            return list(bases)
    return []


def _names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The names that a file assigns, and the names that flow into its runner keys."""
    assigned: set[str] = set()
    used = set(RUNNER_KEYS)
    flows: list[tuple[set[str], set[str]]] = []  # names that change, names that are read
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned |= {target.id for target in targets if isinstance(target, ast.Name)}
            flows.append((set().union(*map(_identifiers, targets)), _identifiers(node.value)))
        else:
            flows.append((_identifiers(node), _identifiers(node)))
        # Read from the base as _base_.name or {{_base_.name}}.
        used |= {child.attr for child in ast.walk(node)
                 if isinstance(child, ast.Attribute) and ast.unparse(child.value) == '_base_'} - assigned
    for _ in flows:
        for changed, read in flows:
            if changed & used:
                used |= read
    return assigned, used - set(RUNNER_KEYS)


def _identifiers(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _drop_empty_scope(value: Any) -> None:
    """Remove the ``_scope_=None`` that mmengine adds to a dict read from ``_base_.name``."""
    if isinstance(value, dict):
        if value.get('_scope_', '') is None:
            del value['_scope_']
        for item in value.values():
            _drop_empty_scope(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _drop_empty_scope(item)


def _lost_in_file(cfg: Config, source: _Source, helpers: Collection[str]) -> Iterator[str]:
    """Helpers of a base that this file redefines without effect: the base had used its own value."""
    names = source.assigned - set(RUNNER_KEYS) - source.used
    bases = source.bases if names else []
    base = {key: value for path in bases for key, value in Config.fromfile(path).items()}
    for name in sorted(names & base.keys()):
        places = _stale_places(name, base, cfg, helpers)
        if places:
            keys = places[0].split('.')
            shown = 'dict('.join(f'{key}=' for key in keys) + name + ')' * (len(keys) - 1)
            yield (f"{name} was redefined, but the base's value is still in {_enumerate(places)}; "
                   f'set {places[0] if "[" in places[0] else shown}')
        elif places is not None:
            yield f'{name} was redefined, but what the base made of it was not; set those keys too'


def _lost_options(
    cfg: Config, before: Config, options: Iterable[str], helpers: Collection[str]
) -> Iterator[str]:
    """Options that set a helper: the config's keys had already taken its old value."""
    for name in sorted({key.split('.')[0] for key in options} - set(RUNNER_KEYS)):
        if name not in before:
            if name not in OLD_KEYS and not closest(name, RUNNER_KEYS, 0.8):  # else that is said already
                near = closest(name, before.keys())
                yield f'{name}: no such key to set' + (f'; did you mean {near!r}?' if near else '')
            continue
        places = _stale_places(name, before, cfg, helpers)
        if places:
            option = places[0].replace('[', '.').replace(']', '')
            yield (f'{name} was redefined, but its old value, used when the file was read, is still in '
                   f'{_enumerate(places)}; set {option}=...')
        elif places is not None:
            yield f'{name} was redefined, but only after the file was read; set the keys made of it instead'


def _stale_places(
    name: str, base: Mapping[str, Any], cfg: Config, helpers: Collection[str]
) -> list[str] | None:
    """Where the runner's keys still hold what the base made of a helper whose new value is nowhere.

    None if the new value is somewhere, or the old one nowhere any more; an empty list if the base
    computed with the old value, so that it cannot be found.
    """
    old, new = base[name], cfg[name]
    if type(old) is type(new) and old == new:
        return None
    old_places = _places(old, base)
    old_places = [place for place in old_places if place.endswith(f'.{name}')] or old_places
    # A number or a flag may be anywhere by chance: it counts only where the base had it.
    new_places = _places(new, cfg)
    if new_places if isinstance(new, str | list | tuple | dict) else set(new_places) & set(old_places):
        return None
    stale = set(_places(old, cfg))
    if old_places:
        return [place for place in old_places if place in stale] or None
    return [] if name in helpers else None


def _places(value: Any, cfg: Mapping[str, Any]) -> list[str]:
    """The paths under the runner's keys that hold a value, or strings that start with it."""

    prefix = isinstance(value, str)

    def search(item: Any, path: str) -> Iterator[str]:
        if type(item) is type(value) and (item == value or value and prefix and item.startswith(value)):
            yield path
        elif isinstance(item, dict):
            for key, child in item.items():
                yield from search(child, f'{path}.{key}')
        elif isinstance(item, list | tuple):
            for i, child in enumerate(item):
                yield from search(child, f'{path}[{i}]')

    return [place for key in RUNNER_KEYS if key in cfg for place in search(cfg[key], key)]


def _enumerate(places: Sequence[str]) -> str:
    return ', '.join(places[:3]) + (f' and {len(places) - 3} more' if len(places) > 3 else '')


@contextmanager
def _repaired_merge() -> Iterator[None]:
    """Lets mmengine merge with ``_merge`` meanwhile: its own fails on a dict over None or over a
    number in a list, and does not say where."""
    original = Config._merge_a_into_b
    Config._merge_a_into_b = staticmethod(_merge)
    try:
        yield
    finally:
        Config._merge_a_into_b = staticmethod(original)


def _merge(a: Mapping[str, Any], b: Any, allow_list_keys: bool = False, path: str = '') -> Any:
    """``a`` merged over ``b``, which stays as it is. A dict over None replaces it; with
    ``allow_list_keys`` the keys of a dict over a list or tuple are indices."""
    is_list = isinstance(b, list | tuple)
    merged: Any = list(b) if is_list else b.copy()
    for key, value in a.items():
        here = f'{path}.{key}' if path else str(key)
        if key == '_delete_':
            continue
        index: Any = key
        if is_list:
            if not key.isdigit() or int(key) >= len(b):
                raise ConfigError(f'{here}: {path} is a list of {len(b)}, with indices 0 to {len(b) - 1}')
            index = int(key)
        old = merged[index] if is_list else merged.get(key)
        if isinstance(value, Mapping):
            if old is None or value.get('_delete_', False):
                old = ConfigDict()
            elif not isinstance(old, dict) and not (allow_list_keys and isinstance(old, list | tuple)):
                kind = f'a list of {len(old)}' if isinstance(old, list | tuple) else repr(old)
                raise ConfigError(f'{here}: a dict cannot be merged over {kind}; '
                                  'give the whole value, or _delete_=True in the dict to replace it')
            value = _merge(value, old, allow_list_keys, here)
        merged[index] = value
    return tuple(merged) if isinstance(b, tuple) else merged


@contextmanager
def _one_line_errors(name: str, files: Mapping[str, _Source]) -> Iterator[None]:
    """A config file is a program: whatever goes wrong in it becomes one line with the file's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f'{name}: {error}') from error
    except Exception as error:
        where = ''
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename in files:
                shown = '' if frame.filename == next(iter(files)) else f'{frame.filename}, '
                where = f'{shown}line {frame.lineno}: '
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).partition('\n')[0]
        text = f'{type(error).__name__}: {text}'
        if isinstance(error, ModuleNotFoundError) and error.name == 'pkg_resources':
            text = 'a _base_ of another package (package::path) needs setuptools<81; give the file instead'
        elif error.__cause__:
            text += f' ({error.__cause__})'
        raise ConfigError(f'{name}: {where}{text}') from error
