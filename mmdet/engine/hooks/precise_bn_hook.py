"""Running statistics of batch norm, recomputed for the weights that are evaluated."""

import itertools
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdet.registry import HOOKS


@HOOKS.register_module()
class PreciseBNHook(Hook):
    """Replace the running means and variances by those of the population, before evaluation and saving.

    The running average mixes statistics of past weights. This aggregates, with the weights as they are,
    those of many batches over all processes, each weighted by its number of elements: "PreciseBN" of
    Wu and Johnson 2021, Rethinking "Batch" in BatchNorm, section 3. Batch norms in eval mode (fixed BN)
    keep theirs. Weights, the order of the epochs and what they draw stay as without the hook:
    EpochSeedHook seeds each epoch anew.

    Args:
        num_iters: batches of each process, at most an epoch's; the first ones of the epoch that ends.
        interval: epochs from one time to the next; the last epoch counts always.

    Raises:
        ValueError: a number is not positive, training is not by epochs, or EMAHook averages the weights.
    """

    def __init__(self, num_iters: int = 200, interval: int = 1) -> None:
        for name, value in dict(num_iters=num_iters, interval=interval).items():
            if value < 1:
                raise ValueError(f'PreciseBNHook: {name} must be positive, not {value}')
        self.num_iters = num_iters
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise ValueError('PreciseBNHook works at the end of epochs: use '
                             "train_cfg.type='EpochBasedTrainLoop', or remove it from custom_hooks")
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError('PreciseBNHook takes the statistics of the trained weights, and EMAHook has '
                             'their average evaluated: remove one of them from custom_hooks')

    def after_train_epoch(self, runner: Runner) -> None:
        if not (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            return
        model: Any = runner.bare_model
        norms: list[Any] = [
            module for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.training and module.track_running_stats]
        sums = {norm: norm.running_mean.new_zeros(1 + 2 * norm.num_features, dtype=torch.float64)
                for norm in norms}

        def add(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[norm] += sums_of(inputs[0])

        # A loader of its own: the training's may have workers that wait for the next epoch.
        loader = runner.train_dataloader
        batches = list(itertools.islice(loader.batch_sampler, self.num_iters))
        handles = [norm.register_forward_pre_hook(add) for norm in norms]
        with torch.no_grad(), runner.optim_wrapper.optim_context(model):
            for batch in DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn,
                                    num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn):
                model._run_forward(model.data_preprocessor(batch, True), mode='loss')
        for handle in handles:
            handle.remove()
        for norm, total in sums.items():
            set_statistics(norm, total)
        runner.logger.info(f'PreciseBNHook: statistics of {len(norms)} batch norms from '
                           f'{len(batches) * dist.get_world_size()} batches')


def sums_of(x: Tensor) -> Tensor:
    """Number, sum and sum of squares of the elements of each channel of (N, C, ...): (1 + 2 C,) float64."""
    number = x.numel() // x.shape[1]
    if not number:
        return x.new_zeros(1 + 2 * x.shape[1], dtype=torch.float64)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
    mean, variance = mean.double(), variance.double()
    return torch.cat([mean.new_ones(1), mean, variance + mean.square()]) * number


def set_statistics(norm: Any, sums: Tensor) -> None:
    """Give a batch norm the mean and unbiased variance of all processes' ``sums_of``, if any has elements."""
    dist.all_reduce(sums)
    number = sums[0]
    if number > 0:
        mean, square = (sums[1:] / number).chunk(2)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp(min=0) * number / (number - 1).clamp(min=1))
