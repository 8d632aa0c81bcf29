"""mmengine's Runner, repaired where it fails on the CPU, on today's PyTorch, or without a warning."""

import importlib.util
import logging
import time
import warnings
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import mmengine
import torch
import torch.distributed
from mmengine.device import get_device
from mmengine.dist import broadcast
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import ReduceOnPlateauParamScheduler
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

import mmdet
from mmdet import checkpoint as checkpoint_file
from mmdet.engine.launch import errors_of
from mmdet.engine.optimizer_state import is_state_of, lay_out_state, pending_gradients
from mmdet.models.backbones.resnet import ResNet
from mmdet.utils.env import to_device

# What later epochs need of mmengine's message hub; all of it is plain.
_HUB_KEYS = ('best_', 'keep_ckpt_ids')


class DetectionRunner(Runner):
    """The training and testing loop.

    Differs from mmengine's Runner in that it runs several processes on the CPU (gloo), writes checkpoints
    of plain types and reads them with ``weights_only=True``, resumes exactly, keeps the console to what
    changes, and adds the hooks without which a training would be wrong.
    """

    param_schedulers: Any
    trust_checkpoint = False  # load also files that could run code

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_console_level(self.cfg.get('log_level', 'INFO'))

    # ---------------------------------------------------------------- processes

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """As mmengine's, which without a GPU fails on several processes: those are joined by gloo."""
        if self.distributed and not torch.cuda.is_available() and not torch.distributed.is_initialized():
            timeout = (env_cfg.get('dist_cfg') or {}).get('timeout')
            torch.distributed.init_process_group('gloo', timeout=timeout and timedelta(seconds=timeout))
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Move the model to its device; with several processes, average its gradients over them."""
        with warnings.catch_warnings():  # `forward_sync_buffers`, its new name, is unknown to torch 2.11
            warnings.filterwarnings('ignore', '`broadcast_buffers` is deprecated')
            if self.distributed and not torch.cuda.is_available():
                if self.cfg.get('sync_bn'):
                    raise ValueError("sync_bn makes batch norms that need GPUs: use norm_cfg.type='SyncBN'")
                options = dict(type='MMDistributedDataParallel', module=model, broadcast_buffers=False,
                               find_unused_parameters=bool(self.cfg.get('find_unused_parameters')))
                return MODEL_WRAPPERS.build(options | (model_wrapper_cfg or {}))
            return super().wrap_model(model_wrapper_cfg, to_device(model, get_device()))

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper of several processes."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    def _init_model_weights(self) -> None:
        """Start the model on the first process (one download) and copy it to the others."""
        if self._resume and self._load_from:
            return
        model: Any = self.bare_model
        if self.rank == 0:
            model.init_weights()
            backbone = getattr(model, 'backbone', None)
            if isinstance(backbone, ResNet) and backbone.pretrained is None and not self._load_from and (
                    backbone.frozen_stages >= 0 or backbone.norm_eval):
                self.logger.warning('model.backbone.pretrained=None: frozen stages and fixed norms stay '
                                    'at their random start; set frozen_stages=-1 and norm_eval=False')
        for value in model.state_dict().values():
            broadcast(value)

    def _maybe_compile(self, target: str) -> None:
        """Compile the model as ``cfg.compile`` says: True, or a dict of torch.compile's arguments."""
        options = self.cfg.get('compile')
        if options:
            compile_backbone_and_neck(self.bare_model, **({} if options is True else options))

    # ---------------------------------------------------------------- log

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """mmengine's logger; what it says while it is built goes to the file only, but for warnings."""
        self.logger = super().build_logger(*args, **kwargs)
        # Of mmengine about itself, and of gradients that `resume` brings back.
        # BatchSizeHook says of trained batch norms what is to be said.
        noise = ('will be deprecated', 'Exp name: ', 'Resumed iteration number is not divisible',
                 'Gradient accumulative may slightly decrease')
        self.logger.addFilter(lambda record: not any(words in record.getMessage() for words in noise))
        self._set_console_level(logging.WARNING)
        return self.logger

    def _set_console_level(self, level: int | str) -> None:
        for handler in self.logger.handlers:
            if not isinstance(handler, logging.FileHandler) and self.rank == 0:
                handler.setLevel(level)

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """JSON lines, and TensorBoard where it is installed."""
        if visualizer is None:
            backends = [dict(type='LocalVisBackend')]
            if self._train_loop is not None and importlib.util.find_spec('tensorboard'):
                backends.append(dict(type='TensorboardVisBackend'))
            visualizer = dict(type='Visualizer', vis_backends=backends)
        return super().build_visualizer(visualizer)

    def register_hooks(self, default_hooks: dict[str, Any] | None = None,
                       custom_hooks: list[Any] | None = None) -> None:
        """The hooks of the config and those that every training needs."""
        names = (
            'ClassesHook', 'EpochSeedHook', 'LossHook', 'SyncBuffersHook', 'BatchSizeHook', 'EncodeHook')
        always = [dict(type=name) for name in names]
        super().register_hooks(default_hooks, always + list(custom_hooks or []))

    def dump_config(self) -> None:
        """Leave the resolved config of a training in its folder; a test leaves that one alone."""
        if self._train_loop is not None:
            super().dump_config()

    # ---------------------------------------------------------------- data

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """mmengine's. For a GPU, batches are kept in page-locked memory: their copying stops nothing.

        Without worker processes (``num_workers=0``, to debug) settings that are for them do not count.
        """
        if isinstance(dataloader, dict):
            dataloader = dict(pin_memory=torch.cuda.is_available()) | dataloader
            if not dataloader.get('num_workers'):
                for key in ('persistent_workers', 'prefetch_factor', 'timeout', 'multiprocessing_context'):
                    dataloader.pop(key, None)
        return Runner.build_dataloader(dataloader, *args, **kwargs)

    # ---------------------------------------------------------------- learning rate

    @property
    def total_batch(self) -> int:
        """Images in one step of the optimizer."""
        return (self.world_size * self.train_dataloader.batch_sampler.batch_size
                * self.optim_wrapper._accumulative_counts)

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """Multiply all learning rates by (total batch) / (batch that the config was written for)."""
        if not (auto_scale_lr and auto_scale_lr.get('enable')):
            return
        total, base = self.total_batch, auto_scale_lr['base_batch_size']
        before = optim_wrapper.optimizer.param_groups[0]['lr']
        for group in optim_wrapper.optimizer.param_groups:
            group['lr'] *= total / base
        given = self.param_schedulers or []
        self.param_schedulers = [_with_scaled_rates(schedule, total / base)
                                 for schedule in ([given] if isinstance(given, dict) else given)]
        self.logger.info(
            f'Learning rate {before:g} x {total} / {base} = {before * total / base:g}: '
            f'scaled from a total batch of {base} to {total} images; '
            'switch this off with --cfg-options auto_scale_lr.enable=False')

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """mmengine's, whose errors name the key."""
        with errors_of('optim_wrapper'):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """mmengine's, whose errors name the key."""
        with errors_of('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    # ---------------------------------------------------------------- checkpoints

    @cached_property
    def config_text(self) -> str:
        """Formatted once: it is slow, and mmengine turns a Ctrl-C meanwhile into a SyntaxError."""
        return self.cfg.pretty_text

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, save_optimizer: bool = True,
                        meta: dict[str, Any] | None = None, by_epoch: bool = True, **kwargs: Any) -> None:
        """Write ``out_dir/filename`` (arguments as mmengine's; only local files). All processes call it."""
        accumulates = save_optimizer and self.optim_wrapper._accumulative_counts > 1
        pending = pending_gradients(self.bare_model, self._loss_scale) if accumulates else {}
        if self.rank:
            return
        hub = self.message_hub.runtime_info
        dataset = getattr(self.train_dataloader.dataset, 'metainfo', {})
        content: dict[str, Any] = dict(
            meta=dict(
                meta or dict(epoch=self.epoch + by_epoch, iter=self.iter + (not by_epoch)),
                seed=self.seed,
                legacy_2019=bool(self.cfg.get('legacy_2019')),
                cfg=self.config_text,
                dataset_meta=dict(classes=tuple(dataset.get('classes', ()))),
                experiment_name=self.experiment_name,
                mmdet_version=mmdet.__version__,
                mmengine_version=mmengine.__version__,
                torch_version=str(torch.__version__),
                time=time.strftime('%Y-%m-%d %H:%M:%S')),
            state_dict=self.bare_model.state_dict(),
            message_hub=dict(runtime_info={k: v for k, v in hub.items() if k.startswith(_HUB_KEYS)}))
        if save_optimizer:
            content['optimizer'] = self.optim_wrapper.state_dict()
        if pending:
            content['gradients'] = pending
        self.call_hook('before_save_checkpoint', checkpoint=content)
        checkpoint_file.save_checkpoint(content, Path(out_dir, filename))

    @property
    def _loss_scale(self) -> float:
        """The factor of the losses in float16, for which a GPU is waited for; 1 without one."""
        scaler = getattr(self.optim_wrapper, 'loss_scaler', None)
        return 1.0 if scaler is None else scaler.get_scale()

    def load_checkpoint(self, filename: str, map_location: Any = 'cpu', strict: bool = False,
                        **kwargs: Any) -> dict[str, Any]:
        """Load weights (``strict``: all of them) and return the checkpoint."""
        content = checkpoint_file.load_file(filename, map_location, self.trust_checkpoint)
        self.call_hook('after_load_checkpoint', checkpoint=content)
        checkpoint_file.load_weights(self.bare_model, content['state_dict'], filename, strict)
        self._has_loaded = True
        self.logger.info(f'Loaded {filename}')
        return content

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Go on as if training had not stopped where ``filename`` was written.

        Weights and the optimizer's momentum come from the checkpoint, all settings from the config. Of an
        epoch that was not at its end all batches are trained on again.

        Raises:
            ValueError: no checkpoint of this training, or of one that has ended.
        """
        content = self.load_checkpoint(filename, strict=True)
        meta = content['meta']
        if problem := self._not_resumable(content):
            raise ValueError(f'{filename} {problem}')
        if classes := getattr(self.train_dataloader.dataset, 'metainfo', {}).get('classes'):
            checkpoint_file.check_classes(meta, classes, filename)
        epochs, iters, batches = 0, meta['iter'], 0
        if isinstance(self.train_loop, EpochBasedTrainLoop):  # whose epochs had perhaps other batches
            epochs, batches = meta['epoch'], meta.get('batches', 0)
            iters = epochs * len(self.train_dataloader)
        if batches:
            self.logger.warning(f'{filename} was written in epoch {epochs + 1}, which starts again: its '
                                f'first {batches} batches are trained on twice')
        self.train_loop._epoch, self.train_loop._iter = epochs, iters
        self._replay_schedules(epochs, iters)
        groups = self.optim_wrapper.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != 'params'} for group in groups]
        self.optim_wrapper.load_state_dict(content['optimizer'])
        for group, values in zip(self.optim_wrapper.optimizer.param_groups, settings):
            group.update(values)
        lay_out_state(self.optim_wrapper.optimizer)
        amidst = iters % self.optim_wrapper._accumulative_counts > 0
        pending = content.get('gradients', {}) if amidst and not batches else {}
        parameters, scale = dict(self.bare_model.named_parameters()), self._loss_scale
        for name, gradient in pending.items():
            if parameters[name].requires_grad:  # a gradient would move what has been frozen since
                parameters[name].grad = torch.empty_like(parameters[name]).copy_(gradient * scale)
        if amidst and not pending:
            self.logger.warning(f'{filename} does not hold the gradients that waited in the middle of an '
                                'accumulation: the first step lacks them')
        saved = content.get('message_hub', {}).get('runtime_info', {})
        self.message_hub.update_info_dict({k: v for k, v in saved.items() if k.startswith(_HUB_KEYS)})
        self.logger.info(f'Resumed from {filename} after epoch {epochs}, iteration {iters}')

    def _not_resumable(self, content: dict[str, Any]) -> str:
        """Why this training cannot go on where a checkpoint was written; '' if it can."""
        meta, instead = content['meta'], 'start from its weights with --cfg-options load_from=...'
        if not checkpoint_file.is_ours(meta) and {'epoch', 'iter'} & meta.keys():
            return f'is of another program, which orders the state of parameters otherwise: {instead}'
        if 'optimizer' not in content or not {'epoch', 'iter'} <= meta.keys():
            return f'holds weights only, no state of a training: {instead}'
        by_epoch = isinstance(self.train_loop, EpochBasedTrainLoop)
        if by_epoch and meta['iter'] and not meta['epoch'] and not meta.get('batches'):
            return f'is of a training by iteration, while the config has one by epoch: {instead}'
        unit, end = ('epoch', self.max_epochs) if by_epoch else ('iter', self.max_iters)
        if meta[unit] >= end:
            return (f'is at {unit} {meta[unit]} of {end}, nothing is left to train: '
                    f'raise train_cfg.max_{unit}s, or evaluate it with tools/test.py')
        if not is_state_of(content['optimizer'] or {}, self.optim_wrapper.optimizer):
            return f'has the state of another optimizer, or of other parameters: {instead}'
        schedules: list[Any] = self.param_schedulers or []
        if any(isinstance(schedule, ReduceOnPlateauParamScheduler) for schedule in schedules):
            return f'does not hold what a ReduceOnPlateau schedule saw of the evaluations: {instead}'
        if 'ema_state_dict' in content and not any(isinstance(hook, EMAHook) for hook in self.hooks):
            return f'holds averaged weights: put the EMAHook that made them into custom_hooks, or {instead}'
        return ''

    def _replay_schedules(self, epochs: int, iters: int) -> None:
        """Bring the schedules to where they are after ``epochs`` of together ``iters`` iterations.

        A saved state would not do: mmengine ends schedules at ``max_epochs`` and forgets what was beyond.
        """
        schedulers: list[Any] = self.param_schedulers or []
        for scheduler in schedulers:
            scheduler.optimizer._global_step = 0  # else mmengine warns of steps without the optimizer's
        for i in range(iters):
            epoch_ends = (i + 1) * epochs // iters > i * epochs // iters
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
            for scheduler in schedulers:
                if scheduler.by_epoch and epoch_ends:
                    scheduler.step()


def compile_backbone_and_neck(model: nn.Module, **options: Any) -> None:
    """torch.compile of these two with ``options``; names in the state dict stay.

    The heads are left alone: their shapes change with every image.
    """
    for part in ('backbone', 'neck'):
        model.get_submodule(part).compile(**options)


def _with_scaled_rates(schedule: Any, factor: float) -> Any:
    """A schedule's config with the learning rates in it multiplied, as a copy."""
    if not isinstance(schedule, dict) or not str(schedule['type']).endswith('LR'):
        return schedule
    rates = {key: schedule.get(key) for key in ('eta_min', 'eta_max', 'min_value')}
    return schedule | {key: rate * factor for key, rate in rates.items() if isinstance(rate, int | float)}
