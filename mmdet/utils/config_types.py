"""The types that a config may name, and their arguments."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, get_type_hints

import mmengine.registry
import mmengine.visualization  # noqa: F401  registers the visualizer and its backends
from mmengine.model import MomentumAnnealingEMA
from mmengine.runner import Runner
from torch import nn

import mmdet.registry

# Where mmengine's classes pass their **kwargs on to.
_FORWARDED: dict[str, Callable] = {
    'CheckpointHook': Runner.save_checkpoint, 'EMAHook': MomentumAnnealingEMA.__init__}
# These accept more than their hints say (``loss_scale: str`` takes a number), so only names are checked.
_LOOSE_HINTS = ('mmengine', 'mmcv', 'torch', 'torchvision')


def _registry(name: str) -> mmengine.registry.Registry:
    return getattr(mmdet.registry, name, getattr(mmengine.registry, name))


def find_type(kind: Any, registries: Sequence[str]) -> tuple[str, Callable | None]:
    """The registry of these that knows a ``type``, and what it builds; None where none does."""
    if callable(kind):
        return (registries[0] if registries else ''), kind
    for name in registries:
        try:
            target = _registry(name).get(str(kind))
        except RuntimeError:  # mmengine's answer to a name that is not registered
            continue
        if target is not None and _fits(target):
            return name, target
    return '', None


def registered_types(registries: Sequence[str]) -> Iterator[str]:
    """The names that these registries know."""
    for name in registries:
        registry: mmengine.registry.Registry | None = _registry(name)
        while registry is not None:
            yield from (name for name, target in registry.module_dict.items() if _fits(target))
            registry = registry.parent


def _fits(target: Any) -> bool:
    """Not for a transform of mmcv, which would leave boxes and masks as they were; for its wrappers, and
    for one of colours."""
    module, name = getattr(target, '__module__', ''), getattr(target, '__name__', '')
    return (not module.startswith('mmcv.transforms') or module == 'mmcv.transforms.wrappers'
            or name == 'RandomGrayscale')


@cache
def arguments_of(target: Callable) -> tuple[dict[str, tuple[Any, bool]], bool]:
    """The arguments of a class or function as ``name: (hint, required)``; whether it takes others too.

    ``**kwargs`` of a class are followed to the next class of its MRO.
    """
    functions: list[Any] = [target]
    if inspect.isclass(target):
        bases = [base for base in target.__mro__ if base not in (nn.Module, object)]
        functions = [vars(base)['__init__'] for base in bases if '__init__' in vars(base)]
    forward = _FORWARDED.get(getattr(target, '__name__', ''))
    if forward:
        functions.append(forward)
    arguments: dict[str, tuple[Any, bool]] = {}
    is_open = False
    for function in functions:
        hints = _hints(function)
        is_open = False
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                is_open = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and name != 'self':
                hint = hints.get(name, Any)
                if parameter.default is None and hint is not Any:
                    hint = hint | None
                needed = parameter.default is parameter.empty and function is not forward
                arguments.setdefault(name, (hint, needed))
        if not is_open:
            break
    return arguments, is_open


def _hints(function: Any) -> dict[str, Any]:
    if getattr(function, '__module__', '').partition('.')[0] in _LOOSE_HINTS:
        return {}
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # a hint that exists only for type checkers
        return {}
