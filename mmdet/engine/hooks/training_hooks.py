"""The hooks that every run has: classes, random numbers, losses, buffers, batch size."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from mmdet.registry import HOOKS


@HOOKS.register_module()
class ClassesHook(Hook):
    """Refuse a model whose heads have another number of classes than the data set, and a validation with
    other classes than the training's.

    Raises:
        ValueError: before the first batch.
    """

    def before_train(self, runner: Runner) -> None:
        self._check(runner, runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader)
            trained, validated = (getattr(loader.dataset, 'metainfo', {}).get('classes', ())
                                  for loader in (runner.train_dataloader, runner.val_dataloader))
            for a, b in zip(trained, validated):
                if a != b:
                    raise ValueError(f'the class {b!r} of val_dataloader.dataset.metainfo.classes is where '
                                     f'train_dataloader has {a!r}: give both the same names in one order')

    def before_test(self, runner: Runner) -> None:
        self._check(runner, runner.test_dataloader)

    @staticmethod
    def _check(runner: Runner, loader: Any) -> None:
        metainfo = getattr(loader.dataset, 'metainfo', {})
        classes = metainfo.get('classes', ())
        source = getattr(loader.dataset, 'ann_file', None) or metainfo.get('ann_file', 'the data set')
        for name, module in runner.bare_model.named_modules():
            number = getattr(module, 'num_classes', len(classes))
            if classes and number != len(classes):
                raise ValueError(
                    f'model.{name}.num_classes is {number}, but {source} is read with '
                    f'{len(classes)} classes: set num_classes of every head to {len(classes)}, or '
                    'metainfo.classes of the data set')


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed all random numbers by (seed, epoch, rank) where an epoch starts.

    The data set draws its augmentation from (seed, epoch, index of the image), see CocoDataset. A resumed
    training then draws what an uninterrupted one draws, with no random state to save. Where training is by
    iteration, whose passes over the data nobody counts, augmentation draws from each worker's numbers.
    """

    priority = 'VERY_HIGH'

    def before_train_epoch(self, runner: Runner) -> None:
        self._seed(runner)
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        for dataset in without_wrappers(runner.train_dataloader.dataset):
            if hasattr(dataset, 'set_epoch'):
                dataset.set_seed(runner.seed)
                dataset.set_epoch(runner.epoch if by_epoch else None)

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


def without_wrappers(dataset: Any) -> Iterator[Any]:
    """The data sets inside mmengine's ConcatDataset, RepeatDataset and ClassBalancedDataset."""
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from without_wrappers(part)
    elif isinstance(dataset, (RepeatDataset, ClassBalancedDataset)):
        yield from without_wrappers(dataset.dataset)
    else:
        yield dataset


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
    """Evaluate the model that is saved: in all processes, with the buffers of the first.

    mmengine's hook of this name averages instead, which alters constants by rounding.
    """

    priority = 'VERY_LOW'  # after EMAHook has put its averages in place

    def before_val_epoch(self, runner: Runner) -> None:
        broadcast_buffers(runner.model)


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers (running statistics) of the first one. All processes must call it."""
    for buffer in model.buffers():
        dist.broadcast(buffer)


@HOOKS.register_module()
class BatchSizeHook(Hook):
    """Warn where batch norm is trained on the statistics of few images.

    Args:
        enough: images a step that are enough; error grows fast below 8 (Wu and He 2018, Group
            Normalization, Fig. 1).
    """

    def __init__(self, enough: int = 8) -> None:
        self.enough = enough

    def before_train(self, runner: Runner) -> None:
        runner.model.train()  # as the loop does next; says which batch norms use their running statistics
        own = runner.train_dataloader.batch_sampler.batch_size
        images = {name: own * (runner.world_size if 'Sync' in type(module).__name__ else 1)
                  for name, module in runner.bare_model.named_modules()
                  if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training}
        few = {name: number for name, number in images.items() if number < self.enough}
        if few:
            first, number = min(few.items(), key=lambda item: item[1])
            runner.logger.warning(
                f'Trained batch norm (layers: {len(few)}, first: {first}) has statistics of {number} images '
                f'a step, which are noisy below {self.enough}: raise train_dataloader.batch_size, use '
                "norm_cfg.type='SyncBN' on more processes, or fix the statistics with norm_eval=True")
