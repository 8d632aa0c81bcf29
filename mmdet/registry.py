"""The registries that config dicts (``dict(type='ResNet', ...)``) are built from.

Each is a child of mmengine's registry of the same name, so that mmengine's own classes
(optimizers, schedulers, hooks) are found too; where this package adds none, the child is there
because mmengine warns about a scope without one. ``locations`` are imported on first use.
"""

import mmengine.registry as root
from mmengine.registry import Registry


def _child(parent: Registry, *locations: str) -> Registry:
    return Registry(parent.name, parent=parent, scope='mmdet', locations=list(locations))


MODELS = _child(root.MODELS, 'mmdet.models', 'mmdet.legacy_2019')
WEIGHT_INITIALIZERS = _child(root.WEIGHT_INITIALIZERS, 'mmdet.models')
MODEL_WRAPPERS = _child(root.MODEL_WRAPPERS, 'mmdet.engine')
TASK_UTILS = _child(root.TASK_UTILS, 'mmdet.models.task_modules', 'mmdet.legacy_2019')
DATASETS = _child(root.DATASETS, 'mmdet.datasets')
DATA_SAMPLERS = _child(root.DATA_SAMPLERS, 'mmdet.datasets')
TRANSFORMS = _child(root.TRANSFORMS, 'mmdet.datasets', 'mmdet.legacy_2019')
METRICS = _child(root.METRICS, 'mmdet.evaluation')
HOOKS = _child(root.HOOKS, 'mmdet.engine')
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS, 'mmdet.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS, 'mmdet.engine')
OPTIMIZERS = _child(root.OPTIMIZERS, 'mmdet.engine')
PARAM_SCHEDULERS = _child(root.PARAM_SCHEDULERS, 'mmdet.engine')
LOOPS = _child(root.LOOPS, 'mmdet.engine')
LOG_PROCESSORS = _child(root.LOG_PROCESSORS, 'mmdet.engine')
VISUALIZERS = _child(root.VISUALIZERS, 'mmdet.engine')
VISBACKENDS = _child(root.VISBACKENDS, 'mmdet.engine')
EVALUATOR = _child(root.EVALUATOR, 'mmdet.engine')
FUNCTIONS = _child(root.FUNCTIONS, 'mmdet.engine')
