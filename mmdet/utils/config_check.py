"""Checks a resolved config against the signatures of what it builds, before anything is built.

``check_config`` starts at the known top-level keys (``config_schema.RUNNER_KEYS``) and follows type hints:
a dict that an object is built from must name a registered type, and its other keys must be
arguments of that type; a dict whose hint is a ``TypedDict`` must have that dict's keys.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from mmengine.config import Config

from mmdet.utils.config_schema import OLD_TYPES, RUNNER_KEYS, Built, too_small
from mmdet.utils.config_types import arguments_of, find_type, registered_types


class ConfigError(ValueError):
    """A config that cannot work. Each line of the message names the config file and the key."""


@dataclass(frozen=True)
class _Scope:
    """What a dict inherits from the one around it: where its type is searched, what it is handed."""

    registries: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()


# Where the dicts inside a built dict are searched: by the registry of the dict around them.
_INSIDE = {
    'MODELS': ('MODELS', 'TASK_UTILS', 'WEIGHT_INITIALIZERS'),
    'TASK_UTILS': ('TASK_UTILS', 'MODELS'),
    'DATASETS': ('DATASETS', 'TRANSFORMS'),
    'TRANSFORMS': ('TRANSFORMS',),
    'EVALUATOR': ('METRICS',),
    'VISUALIZERS': ('VISBACKENDS',),
}
_ANYWHERE = ('MODELS', 'TASK_UTILS', 'DATASETS', 'DATA_SAMPLERS', 'TRANSFORMS', 'METRICS', 'HOOKS')
_SCALARS: dict[Any, tuple[type, ...]] = {
    type(None): (type(None),), str: (str,), bool: (bool, int), int: (int,), float: (int, float)}


def check_config(cfg: Config | Mapping[str, Any], filename: str, helpers: Collection[str] = ()) -> None:
    """Check every key of a resolved config; nothing is built.

    Args:
        cfg: the config, ``_base_`` files and options merged.
        filename: the config file as the user gave it, for the messages.
        helpers: top-level names known to be helper variables, however close to a known key.

    Raises:
        ConfigError: with one line per unknown or missing key, unknown type or value of a wrong kind;
            above them a line that counts them if they are several.
    """
    report(find_problems(cfg, helpers), filename)


def find_problems(cfg: Config | Mapping[str, Any], helpers: Collection[str]) -> list[str]:
    """What ``check_config`` reports, each 'path of the key: what is wrong'."""
    # The runner hands this key to the model.
    scope = _Scope(given=frozenset({'data_preprocessor'} & cfg.keys()))
    problems: list[str] = []
    for key, value in cfg.items():
        if key in RUNNER_KEYS:
            problems += _check(value, RUNNER_KEYS[key], key, scope)
        elif key not in helpers and (near := closest(key, RUNNER_KEYS, 0.8)):
            problems.append(f'{key}: unknown top-level key; did you mean {near!r}?')
    loop = cfg.get('train_cfg')
    if isinstance(loop, Mapping) and {'type', 'by_epoch'} <= loop.keys():
        problems.append('train_cfg.by_epoch: train_cfg.type says that already; give one of them')
    return [*problems, *too_small(cfg)]


def report(problems: Iterable[str], filename: str) -> None:
    """Raise a ``ConfigError`` of the problems of a config file, if there are any."""
    lines = [f'{filename}: {problem}' for problem in dict.fromkeys(problems)]
    if len(lines) > 1:
        lines.insert(0, f'{filename}: {len(lines)} problems')
    if lines:
        raise ConfigError('\n'.join(lines))


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name most like ``name``, or None if its similarity (0 to 1) is below the cutoff."""
    scored = [(SequenceMatcher(None, name.lower(), other.lower()).ratio(), other) for other in known]
    score, best = max(scored, default=(0.0, None))
    return best if score >= cutoff else None


def _suggest(name: Any, known: Iterable[str]) -> str:
    known = sorted(known)
    if near := closest(str(name), known):
        return f'did you mean {near!r}?'
    if len(known) > 20:
        return f'the closest is {closest(str(name), known, 0.0)!r}'
    return f'known: {", ".join(known) or "none"}'


def _check(value: Any, hint: Any, path: str, scope: _Scope) -> Iterator[str]:
    """The problems of one value, each 'path: what is wrong'."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Required, NotRequired):
        yield from _check(value, args[0], path, scope)
    elif origin is Annotated:
        built = next((mark for mark in hint.__metadata__ if isinstance(mark, Built)), None)
        yield from (_check_built(value, built, path, scope) if built else _check(value, args[0], path, scope))
    elif origin in (Union, UnionType):
        fitting = _alternatives(value, args)
        results = [list(_check(value, arg, path, scope)) for arg in fitting or args]
        if all(results):
            yield from results[0] if fitting else [_expected(path, hint, value)]
    elif origin is Literal:
        if value not in args:
            yield f'{path}: {value!r} is unknown; {_suggest(value, map(str, args))}'
    elif is_typeddict(hint):
        if not isinstance(value, Mapping):
            yield _expected(path, hint, value)
        else:
            hints = get_type_hints(hint, include_extras=True)
            yield from _check_keys(value, hints, hint.__required_keys__, path, 'key', scope)
    elif (origin or hint) in (list, tuple, Sequence):
        yield from _check_sequence(value, hint, path, scope)
    elif (origin or hint) in (dict, Mapping):
        yield from _check_dict(value, hint, path, scope)
    elif hint in _SCALARS:
        if not isinstance(value, _SCALARS[hint]):
            yield _expected(path, hint, value)
    else:
        yield from _check_unknown(value, path, scope)


def _check_sequence(value: Any, hint: Any, path: str, scope: _Scope) -> Iterator[str]:
    args = get_args(hint)
    fixed = get_origin(hint) is tuple and Ellipsis not in args
    if not isinstance(value, list | tuple) or fixed and len(value) != len(args):
        yield _expected(path, hint, value)
        return
    for i, item in enumerate(value):
        item_hint = args[i] if fixed else args[0] if args else Any
        yield from _check(item, item_hint, f'{path}[{i}]', scope)


def _check_dict(value: Any, hint: Any, path: str, scope: _Scope) -> Iterator[str]:
    """A plain ``dict``, which a type is built from if it is part of a model or item of a pipeline, and
    may hold anything elsewhere; or a ``dict[str, X]``."""
    args = get_args(hint)
    item = path.endswith(']') and scope.registries in (_INSIDE['DATASETS'], _INSIDE['TRANSFORMS'])
    built = item or scope.registries in (_INSIDE['MODELS'], _INSIDE['TASK_UTILS'])
    if not isinstance(value, Mapping):
        yield _expected(path, hint, value)
    elif args and args[1] is not Any:
        for key, item in value.items():
            problems = list(_check(item, args[1], f'{path}.{key}', scope))
            if problems and (near := closest(key, value.keys() - {key}, 0.8)):
                problems = [f'{path}.{key}: unknown key; did you mean {near!r}?']
            yield from problems
    elif built and 'type' not in value:
        yield _missing_type(value, path)
    else:
        yield from _check_unknown(value, path, scope)


def _check_unknown(value: Any, path: str, scope: _Scope) -> Iterator[str]:
    """A value without a hint: only its dicts with a type are known."""
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _check_unknown(item, f'{path}[{i}]', scope)
    elif isinstance(value, Mapping) and 'type' in value:
        yield from _check_built(value, None, path, scope)
    elif isinstance(value, Mapping):
        if (near := closest('type', map(str, value), 0.85)) not in (None, 'dtype', 'types'):
            yield f"{path}.{near}: unknown key; did you mean 'type'?"
        for key, item in value.items():
            yield from _check_unknown(item, f'{path}.{key}', scope)


def _check_built(value: Any, built: Built | None, path: str, scope: _Scope) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f'{path}: expected a dict with a type, got {value!r}'
        return
    built = built or Built('')
    registries = (built.registry,) if built.registry else scope.registries
    default = built.default(value) if inspect.isfunction(built.default) else built.default
    kind = value.get('type', default) if registries else default
    if kind is None:
        yield _missing_type(value, path)
        return
    registry, target = find_type(kind, registries)
    if target is None:
        instead = OLD_TYPES.get(str(kind)) or _suggest(kind, registered_types(registries))
        yield f'{path}.type: {kind!r} is not registered; {instead}'
        return
    arguments, is_open = arguments_of(target)
    hints = {name: hint for name, (hint, _) in arguments.items()}
    required = {name for name, (_, needed) in arguments.items() if needed}
    if built.extra:
        hints |= get_type_hints(built.extra, include_extras=True)
        required |= built.extra.__required_keys__
    keys = {key: item for key, item in value.items() if key != 'type' or not registries}
    if is_open:
        keys = {key: item for key, item in keys.items() if key in hints or closest(key, hints, 0.75)}
    required -= {*built.given, *scope.given}
    if path.count('.'):  # a part: the detector hands it its share of train_cfg and test_cfg
        required = {name for name in required if not name.startswith(('train_', 'test_'))}
    inside = _Scope(_INSIDE.get(registry, _ANYWHERE), frozenset(arguments))
    what = f'argument of {kind if isinstance(kind, str) else getattr(kind, "__name__", kind)}'
    yield from _check_keys(keys, hints, required, path, what, inside)


def _check_keys(value: Mapping[str, Any], hints: Mapping[str, Any], required: Collection[str], path: str,
                what: str, scope: _Scope) -> Iterator[str]:
    missing = {*required} - value.keys()
    for key, item in value.items():
        if key in hints:
            yield from _check(item, hints[key], f'{path}.{key}', scope)
        elif key != '_scope_':
            missing.discard(closest(str(key), missing) or '')
            problem = f'{path}.{key}: unknown {what}; {_suggest(key, hints)}'
            yield problem if 'did you mean' in problem else f'{problem}; _delete_=True drops what a base sets'
    for key in sorted(missing):
        yield f'{path}.{key}: missing; it is a required {what}'


def _missing_type(value: Mapping[str, Any], path: str) -> str:
    if near := closest('type', map(str, value), 0.7):
        return f"{path}.{near}: unknown key; did you mean 'type'?"
    return f"{path}.type: missing; the dict has only {', '.join(map(str, value)) or 'no keys'}"


def _expected(path: str, hint: Any, value: Any) -> str:
    return f'{path}: expected {_describe(hint)}, got {value!r}'


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return ' or '.join(map(_describe, args))
    if origin is Annotated or is_typeddict(hint) or (origin or hint) in (dict, Mapping):
        return 'a dict'
    if origin is Literal:
        return f'one of {", ".join(map(repr, args))}'
    if origin is tuple and Ellipsis not in args:
        return f'{len(args)} values'
    if (origin or hint) in (list, tuple, Sequence):
        return 'a list'
    return 'None' if hint is type(None) else getattr(hint, '__name__', str(hint))


def _alternatives(value: Any, args: Sequence[Any]) -> list[Any]:
    """Those hints of a union that are for values of this kind."""
    if isinstance(value, Mapping):
        fitting = [arg for arg in args if _describe(arg) == 'a dict']
    elif isinstance(value, list | tuple):
        fitting = [arg for arg in args if (get_origin(arg) or arg) in (list, tuple, Sequence)]
    elif isinstance(value, str):
        return [arg for arg in args if arg is str or get_origin(arg) is Literal]
    else:
        return []
    return fitting or [arg for arg in args if arg not in _SCALARS and get_origin(arg) is not Literal]
