"""The known top-level keys of a config and what each may hold, as type hints for ``check_config``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Required, TypedDict

from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Built:
    """Marks a hint: the dict is what an object of ``registry`` is built from.

    Args:
        registry: name of the registry; '' if the type is always ``default``.
        default: type of a dict that names none.
        given: arguments that the builder adds to those of the dict.
        extra: ``TypedDict`` of the keys that the builder takes out, or whose hint it knows better.
    """

    registry: str
    default: Any = None
    given: tuple[str, ...] = ()
    extra: Any = None


class DataLoaderKeys(TypedDict, total=False):
    """Keys of a dataloader that mmengine handles before it calls ``torch.utils.data.DataLoader``."""

    dataset: Required[Annotated[dict, Built('DATASETS')]]
    sampler: Annotated[dict, Built('DATA_SAMPLERS', given=('dataset', 'seed'))]
    batch_sampler: Annotated[dict, Built('DATA_SAMPLERS', given=('sampler', 'batch_size'))] | None
    collate_fn: Annotated[dict, Built('FUNCTIONS', given=('data_batch',))]
    worker_init_fn: Annotated[dict, Built('FUNCTIONS', given=('worker_id',))]
    batch_size: int
    num_workers: int
    persistent_workers: bool
    num_batch_per_epoch: int
    disable_subprocess_warning: bool


class CustomKey(TypedDict, total=False):
    """Multipliers for the parameters whose name contains a key of ``paramwise_cfg.custom_keys``."""

    lr_mult: float
    decay_mult: float


class ParamwiseConfig(TypedDict, total=False):
    """``optim_wrapper.paramwise_cfg`` of mmengine's DefaultOptimWrapperConstructor."""

    custom_keys: dict[str, CustomKey]
    bias_lr_mult: float
    bias_decay_mult: float
    norm_decay_mult: float
    flat_decay_mult: float
    dwconv_decay_mult: float
    bypass_duplicate: bool


class ClipGradConfig(TypedDict, total=False):
    """``optim_wrapper.clip_grad``: by norm (the arguments of ``clip_grad_norm_``) or by value."""

    type: Literal['norm', 'value']
    max_norm: float
    norm_type: float | str
    error_if_nonfinite: bool
    foreach: bool | None
    clip_value: float


class OptimWrapperKeys(TypedDict, total=False):
    """Keys of ``optim_wrapper`` that its constructor handles."""

    optimizer: Required[Annotated[dict, Built('OPTIMIZERS', given=('params',))]]
    constructor: str
    paramwise_cfg: ParamwiseConfig | None
    clip_grad: ClipGradConfig | None


class SchedulerKeys(TypedDict, total=False):
    """Keys of a parameter scheduler that its builder handles."""

    convert_to_iter_based: bool


class MultiProcessingConfig(TypedDict, total=False):
    """``env_cfg.mp_cfg``."""

    mp_start_method: Literal['fork', 'spawn', 'forkserver']
    opencv_num_threads: int


class DistributedConfig(TypedDict, total=False):
    """``env_cfg.dist_cfg``; timeout in seconds."""

    backend: str
    init_backend: str
    timeout: int
    port: int
    init_method: str


class EnvironmentConfig(TypedDict, total=False):
    """``env_cfg``."""

    cudnn_benchmark: bool
    mp_cfg: MultiProcessingConfig
    dist_cfg: DistributedConfig
    resource_limit: int


class RandomnessConfig(TypedDict, total=False):
    """``randomness``."""

    seed: int | None
    diff_rank_seed: bool
    deterministic: bool


class AutoScaleConfig(TypedDict, total=False):
    """``auto_scale_lr``: the learning rate is for ``base_batch_size`` images in all processes."""

    enable: bool
    base_batch_size: int


class CustomImports(TypedDict, total=False):
    """``custom_imports``: modules that register what the config builds."""

    imports: Required[str | list[str]]
    allow_failed_imports: bool


class LoopKeys(TypedDict, total=False):
    """Key of ``train_cfg`` that chooses the loop when it names no type."""

    by_epoch: bool


def _loader() -> Any:
    return Annotated[dict, Built('', default=DataLoader, extra=DataLoaderKeys)]


def _loop(default: Any, *given: str, extra: Any = None) -> Any:
    return Annotated[dict, Built('LOOPS', default, ('runner', 'dataloader', *given), extra)]


def _train_loop(cfg: Mapping[str, Any]) -> str:
    return 'EpochBasedTrainLoop' if cfg.get('by_epoch', True) else 'IterBasedTrainLoop'


_Model = Annotated[dict, Built('MODELS')]
_Hook = Annotated[dict, Built('HOOKS')]
_Metric = Annotated[dict, Built('METRICS')]
_Evaluator = Annotated[dict, Built('EVALUATOR', default='Evaluator')]
_Scheduler = Annotated[
    dict, Built('PARAM_SCHEDULERS', given=('optimizer', 'epoch_length', 'param_name'), extra=SchedulerKeys)]

# Every top-level key that the runner or a tool reads. Other names, but OLD_KEYS, are helper variables.
RUNNER_KEYS: dict[str, Any] = {
    'model': _Model,
    'data_preprocessor': _Model | None,
    'model_wrapper_cfg': Annotated[
        dict, Built('MODEL_WRAPPERS', 'MMDistributedDataParallel', ('module', 'device_ids'))] | None,
    'tta_model': type(None),  # there is no test-time augmentation
    'train_dataloader': _loader() | None,
    'val_dataloader': _loader() | None,
    'test_dataloader': _loader() | None,
    'train_cfg': _loop(_train_loop, extra=LoopKeys) | None,
    'val_cfg': _loop('ValLoop', 'evaluator') | None,
    'test_cfg': _loop('TestLoop', 'evaluator') | None,
    'val_evaluator': _Metric | _Evaluator | list[_Metric] | None,
    'test_evaluator': _Metric | _Evaluator | list[_Metric] | None,
    'optim_wrapper': Annotated[dict, Built('OPTIM_WRAPPERS', 'OptimWrapper', extra=OptimWrapperKeys)] | None,
    'param_scheduler': _Scheduler | list[_Scheduler] | None,
    'auto_scale_lr': AutoScaleConfig | None,
    'default_hooks': dict[str, _Hook | None] | None,
    'custom_hooks': list[_Hook] | None,
    'visualizer': Annotated[dict, Built('VISUALIZERS', 'Visualizer')] | None,
    'log_processor': Annotated[dict, Built('LOG_PROCESSORS', 'LogProcessor')] | None,
    'log_level': Literal['DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL'] | int,
    'env_cfg': EnvironmentConfig,
    'randomness': RandomnessConfig,
    'default_scope': str | None,
    'custom_imports': CustomImports | None,
    'work_dir': str | None,
    'experiment_name': str | None,
    'load_from': str | None,
    'resume': bool,
    'launcher': str,
    'sync_bn': Literal['torch', 'mmcv'] | None,
    'find_unused_parameters': bool,
    'compile': bool | dict[str, Any],
    'activation_checkpointing': type(None),  # mmengine's loses gradients; model.backbone.with_cp does not
    'efficient_conv_bn_eval': type(None),  # mmengine's cannot trace our layers, whose norms are one pass
    'legacy_2019': bool,
}

# Of mmdetection 1.x and 2.x: what says the same here.
OLD_KEYS: dict[str, str] = {
    'data': 'train_dataloader, val_dataloader and test_dataloader',
    'optimizer': 'optim_wrapper.optimizer',
    'optimizer_config': 'optim_wrapper.clip_grad',
    'fp16': '--amp',
    'lr_config': 'param_scheduler',
    'total_epochs': 'train_cfg.max_epochs',
    'runner': 'train_cfg',
    'workflow': 'train_cfg and --validate',
    'evaluation': 'val_evaluator and --validate',
    'checkpoint_config': 'default_hooks.checkpoint',
    'log_config': 'default_hooks.logger and visualizer',
    'dist_params': 'env_cfg.dist_cfg',
    'resume_from': '--resume_from, or resume=True with load_from',
}

# Of their pipelines: what does the same here.
OLD_TYPES: dict[str, str] = {
    'Normalize': 'model.data_preprocessor does that',
    'Pad': 'model.data_preprocessor does that',
    'DefaultFormatBundle': 'PackDetInputs does that',
    'ImageToTensor': 'PackDetInputs does that',
    'Collect': 'PackDetInputs does that',
}

# Least values of numbers, whole ones where the least is, that libraries take unseen and fail on later.
_LEAST: dict[str, int | float] = {
    'optim_wrapper.optimizer.lr': 0.0,
    'optim_wrapper.optimizer.momentum': 0.0,
    'optim_wrapper.optimizer.weight_decay': 0.0,
    'optim_wrapper.accumulative_counts': 1,
    'train_cfg.max_epochs': 1,
    'train_cfg.max_iters': 1,
    'train_cfg.val_interval': 1,
    'auto_scale_lr.base_batch_size': 1,
    'default_hooks.logger.interval': 1,
    'model.data_preprocessor.pad_size_divisor': 1,
    **{f'{name}_dataloader.batch_size': 1 for name in ('train', 'val', 'test')},
    **{f'{name}_dataloader.num_workers': 0 for name in ('train', 'val', 'test')},
}


def too_small(cfg: Any) -> Iterator[str]:
    """The numbers of a config that cannot be, each 'path of the key: what is wrong'."""
    for path, least in _LEAST.items():
        *parents, key = path.split('.')
        part = cfg
        for name in parents:
            part = part.get(name) if hasattr(part, 'get') else None
        if not isinstance(part, Mapping) or key not in part:
            continue
        value, kind = part[key], 'a whole number' if isinstance(least, int) else 'a number'
        types = (int,) if isinstance(least, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, types) or not value >= least:
            yield f'{path}: expected {kind} from {least:g} on, got {value!r}'
