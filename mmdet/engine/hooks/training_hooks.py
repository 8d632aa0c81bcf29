"""The hooks that every run has: classes, random numbers, losses, buffers."""

import random
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.registry import HOOKS


@HOOKS.register_module()
class ClassesHook(Hook):
    """Refuse a model whose heads have another number of classes than the data set.

    Raises:
        ValueError: before the first batch.
    """

    def before_train(self, runner: Runner) -> None:
        self._check(runner, runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        self._check(runner, runner.test_dataloader)

    @staticmethod
    def _check(runner: Runner, loader: Any) -> None:
        classes = getattr(loader.dataset, 'metainfo', {}).get('classes', ())
        for name, module in runner.bare_model.named_modules():
            number = getattr(module, 'num_classes', len(classes))
            if classes and number != len(classes):
                raise ValueError(
                    f'model.{name}.num_classes is {number}, but {loader.dataset.ann_file} is read with '
                    f'{len(classes)} classes: set num_classes of every head to {len(classes)}, or '
                    'metainfo.classes of the data set')


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed all random numbers by (seed, epoch, rank) where an epoch starts.

    The data set draws its augmentation from (seed, epoch, index of the image), see CocoDataset. A resumed
    training then draws what an uninterrupted one draws, with no random state to save.
    """

    priority = 'VERY_HIGH'

    def before_train_epoch(self, runner: Runner) -> None:
        self._seed(runner)
        dataset = runner.train_dataloader.dataset
        if hasattr(dataset, 'set_epoch'):
            dataset.set_seed(runner.seed)
            dataset.set_epoch(runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        # Once more after the loader's start, which draws a number only if its workers are new.
        if batch_idx == 0:
            self._seed(runner)

    @staticmethod
    def _seed(runner: Runner) -> None:
        seed = int(np.random.SeedSequence([runner.seed, runner.epoch, runner.rank]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@HOOKS.register_module()
class LossHook(Hook):
    """Average the logged losses over the processes; stop when one is no number any more."""

    priority = 0  # before mmengine's RuntimeInfoHook takes the values to the log

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict[str, torch.Tensor] | None = None) -> None:
        """
        Raises:
            FloatingPointError: a loss is NaN or infinite. All processes raise it together, and no
                checkpoint is written.
        """
        if not outputs:
            return
        values = torch.stack([value.detach().float() for value in outputs.values()])
        dist.all_reduce(values, op='mean')
        outputs.update(zip(outputs, values))
        if not values.isfinite().all():
            losses = ', '.join(f'{name} {value:.4g}' for name, value in outputs.items())
            raise FloatingPointError(
                f'the loss is not finite at epoch {runner.epoch + 1}, iteration {batch_idx + 1} ({losses}): '
                'lower optim_wrapper.optimizer.lr, or set optim_wrapper.clip_grad.max_norm=35; '
                f'the checkpoints in {runner.work_dir} are untouched')


@HOOKS.register_module()
class SyncBuffersHook(Hook):
    """Give every process the buffers (running statistics) of the first one after each epoch.

    So the checkpoint, which the first process writes, is the model that all of them evaluate and resume.
    mmengine's hook of this name averages instead, which alters constants by rounding.
    """

    def after_train_epoch(self, runner: Runner) -> None:
        for buffer in runner.model.buffers():
            dist.broadcast(buffer)
