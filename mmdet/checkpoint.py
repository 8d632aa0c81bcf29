"""Checkpoints: written whole or not at all, read without running what is inside, converted to our names.

A checkpoint is a dict of plain types and tensors: ``state_dict``, ``meta`` (epoch, iter, seed, config text,
class names, versions, time) and, from training, ``optimizer``. This file alone knows the names and the order
of classes in files from elsewhere; our own are those of mmdetection 3.x. ``meta['legacy_2019']`` marks
weights that were trained with the numerics of 2019.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet.checkpoint_files import find_checkpoint, local_file, read_file, save_checkpoint

__all__ = ['check_classes', 'convert_2019', 'find_checkpoint', 'is_ours', 'load_file', 'load_meta',
           'load_pretrained_backbone', 'load_weights', 'recognise', 'save_checkpoint']

FORMAT_2019 = '2019 format'


def load_file(source: str | Path, map_location: str | torch.device = 'cpu',
              trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint of whatever format and convert it to our names and classes; says what it is.

    Args:
        source: path or address (see ``local_file``) of a ``.pth`` or ``.safetensors`` file.
        map_location: device of the tensors.
        trust: load also what is neither a plain type nor a tensor, and could run code.

    Returns:
        ``state_dict``, ``meta`` (with ``legacy_2019=True`` for a file of 2019, and the names of the classes
        in ``dataset_meta``) and what else the file holds.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be fetched.
        ValueError: it is empty, cut off, no checkpoint, or holds something besides plain types and tensors.
    """
    content, found = _read(source, map_location, trust)
    print_log(f'{source} is recognised: {found}', 'current', logging.INFO)
    return content


def load_meta(source: str | Path, trust: bool = False) -> dict[str, Any]:
    """The ``meta`` of :func:`load_file`, which raises the same errors; says nothing."""
    return _read(source, 'cpu', trust)[0]['meta']


def _read(source: str | Path, map_location: str | torch.device, trust: bool) -> tuple[dict[str, Any], str]:
    """What :func:`load_file` returns and what it says."""
    content = read_file(local_file(str(source)), map_location, trust)
    meta = content.get('meta')
    meta = dict(meta) if isinstance(meta, dict) else {}
    weights = _without_wrappers(content['state_dict'])
    found = recognise(weights, meta)
    if found.startswith(FORMAT_2019):
        weights = convert_2019(weights)
        meta['legacy_2019'] = True
        content.pop('optimizer', None)  # its momentum has the old order of parameters and classes
    return content | dict(state_dict=weights, meta=_with_classes(meta)), found


# -------------------------------------------------------------------- formats


def recognise(weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """What wrote a state dict, by its names; those of mmdetection 2.x, 3.x and ours are the same."""
    if any(re.match(r'(bbox|mask)_head\.(\d+\.)?(fc_cls|conv_logits)\.', name) for name in weights):
        return f'{FORMAT_2019} (mmdetection 0.x and 1.x): names are converted, background goes last'
    if {'conv1.weight', 'layer1.0.conv1.weight'} <= weights.keys():
        return 'ImageNet backbone'
    if meta.get('legacy_2019'):
        return 'of this project, with the numerics of 2019'
    if is_ours(meta):
        return 'of this project'
    if 'mmengine_version' in meta:
        return 'mmdetection 3.x'
    if 'mmcv_version' in meta:
        return 'mmdetection 2.x'
    if any(name.startswith('roi_head.') for name in weights):
        return 'mmdetection 2.x or 3.x'
    return 'a state dict of names that are taken as they are'


def is_ours(meta: Mapping[str, Any]) -> bool:
    """Whether this project wrote the checkpoint; mmdetection names its version or mmengine's, not both."""
    return {'mmdet_version', 'mmengine_version'} <= meta.keys()


def convert_2019(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of 2019 (background is class 0) with today's names and classes (background is last).

    Box and mask heads move under ``roi_head``; with C classes ``fc_cls`` (C + 1, ...) rotates by one row,
    ``fc_reg`` (4 C + 4, ...) and ``conv_logits`` (C + 1, ...) lose what they had for the background; those
    that do not tell classes apart, with 4 rows or 1, stay.
    """
    converted = {}
    for name, value in weights.items():
        if name.startswith(('bbox_head.', 'mask_head.')):
            name = f'roi_head.{name}'
        layer = name.split('.')[-2] if '.' in name else ''
        if layer == 'fc_cls':
            value = value.roll(-1, 0)
        elif layer == 'fc_reg' and len(value) > 4:
            value = value[4:].clone()  # a slice would be saved with the whole
        elif layer == 'conv_logits' and len(value) > 1:
            value = value[1:].clone()
        converted[name.replace('.conv2_offset.', '.conv2.conv_offset.')] = value
    return converted


def _without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the ``module.`` of a parallel wrapper; no averages beside, no pixel mean and std."""
    weights = {name.removeprefix('module.'): value for name, value in weights.items()}
    return {name: value for name, value in weights.items()
            if not name.startswith(('ema_', 'data_preprocessor.'))}


def _with_classes(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` with the names of the classes where mmdetection 3.x has them: ``dataset_meta['classes']``."""
    dataset = meta.get('dataset_meta')
    dataset = dict(dataset) if isinstance(dataset, Mapping) else {}
    beside = dataset.pop('CLASSES', None)
    old = _class_names(meta.get('CLASSES')) or _class_names(beside)
    if meta.get('legacy_2019'):
        old = tuple(name.replace('_', ' ') for name in old)  # COCO's own names have spaces
    if names := old or _class_names(dataset.pop('classes', None)):
        dataset['classes'] = names
    return meta | dict(dataset_meta=dataset) if dataset or 'dataset_meta' in meta else meta


def _class_names(value: Any) -> tuple[str, ...]:
    """The names that a file holds in whatever form; a single one may be a plain string."""
    value = value.tolist() if hasattr(value, 'tolist') else value  # an array
    if isinstance(value, str | bytes):
        value = [value]
    elif isinstance(value, Mapping) and all(isinstance(number, int) for number in value.values()):
        value = sorted(value, key=value.__getitem__)
    elif isinstance(value, Mapping):  # of names by number, perhaps as text
        value = [value[key] for key in sorted(value, key=lambda key: (len(str(key)), str(key)))]
    if not isinstance(value, Iterable):
        return ()
    return tuple(name.decode(errors='replace') if isinstance(name, bytes) else str(name) for name in value)


def check_classes(meta: Mapping[str, Any], classes: Sequence[str], source: str) -> None:
    """
    Raises:
        ValueError: the checkpoint of this ``meta`` was trained on other classes, or in another order.
    """
    trained = (meta.get('dataset_meta') or {}).get('classes')
    if trained and [name.replace('_', ' ') for name in trained] != [c.replace('_', ' ') for c in classes]:
        raise ValueError(f'{source} was trained on the classes {", ".join(trained)}, but the data set of '
                         f'the config has {", ".join(classes)}: use the config of the checkpoint, or set '
                         'metainfo.classes of the data set')


# -------------------------------------------------------------------- into a model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str, strict: bool = True) -> None:
    """Copy ``weights`` into ``model``; without ``strict`` what differs is left out, and logged.

    A batch norm without ``num_batches_tracked`` is complete: PyTorch before 0.4.1 wrote none.

    Raises:
        ValueError: with ``strict``, listing every name or shape that differs; else only when nothing fits.
    """
    own = model.state_dict()
    uncounted = {name for name in own.keys() - weights.keys() if name.endswith('.num_batches_tracked')
                 and name.replace('num_batches_tracked', 'running_var') in weights}
    missing = own.keys() - weights.keys() - uncounted
    unexpected = weights.keys() - own.keys()
    reshaped = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    fitting = {name: value for name, value in weights.items() if name not in unexpected | reshaped}
    if missing or unexpected or reshaped or not fitting:
        shapes = [f'{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model'
                  for name in own if name in reshaped]
        lines = [f'{source} does not fit the model: {len(missing)} of {len(own)} names missing, '
                 f'{len(unexpected)} unknown, {len(reshaped)} of another shape']
        lines += _listing('missing in the file', _grouped(name for name in own if name in missing))
        lines += _listing('unknown to the model', _grouped(name for name in weights if name in unexpected))
        lines += _listing('of another shape', shapes)
        if strict or not fitting:
            raise ValueError('\n'.join(lines))
        print_log('\n'.join(lines), 'current', logging.WARNING)
    model.load_state_dict(fitting, strict=False)


def _grouped(names: Iterable[str]) -> list[str]:
    """One entry a module: ``a.bn.{weight, bias}`` for ``a.bn.weight`` and ``a.bn.bias``."""
    leaves = defaultdict(list)
    for name in names:
        module, _, leaf = name.rpartition('.')
        leaves[module].append(leaf)
    return [f'{module}.{{{", ".join(group)}}}' if len(group) > 1 else f'{module}.{group[0]}'.lstrip('.')
            for module, group in leaves.items()]


def _listing(title: str, entries: list[str]) -> list[str]:
    return [f'  {title}:', *(f'    {entry}' for entry in entries)] if entries else []


def load_pretrained_backbone(backbone: nn.Module, source: str) -> None:
    """Start ``backbone`` from classification weights.

    Args:
        backbone: has torchvision's ResNet names, without ``fc``; its context blocks keep their own start. Of
            a classifier or detector of OpenMMLab what is under ``backbone.`` counts.
        source: ``torchvision://resnet50`` (the IMAGENET1K_V1 weights), ``open-mmlab://resnext101_32x4d``, an
            https address or the path of a file.

    Raises:
        FileNotFoundError: the weights can neither be found nor fetched.
        ValueError: unknown name, or weights of another network.
    """
    try:
        weights = load_file(source)['state_dict']
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}, or start from random weights with '
                                '--cfg-options model.backbone.pretrained=None') from None
    if any(name.startswith('backbone.') for name in weights):
        weights = {name.removeprefix('backbone.'): value
                   for name, value in weights.items() if name.startswith('backbone.')}
    # Caffe's convolutions have biases, which are zeros where a norm follows.
    own = backbone.state_dict()
    weights = {name: value for name, value in weights.items() if not name.startswith('fc.')
               and not (name.endswith('.bias') and name not in own and not value.any())}
    # DCN and GC layers are not in a classification network.
    weights |= {name: value for name, value in own.items()
                if name not in weights and ('context_block.' in name or 'conv_offset.' in name)}
    load_weights(backbone, weights, source)
