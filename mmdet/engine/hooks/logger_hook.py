"""Progress in the console and in the log files."""

import time

import mmengine.hooks
from mmengine.runner import IterBasedTrainLoop, Runner

from mmdet.registry import HOOKS


@HOOKS.register_module()
class LoggerHook(mmengine.hooks.LoggerHook):
    """mmengine's log lines every ``interval`` iterations, and at least every ``seconds`` seconds.

    Training by iteration is logged by iteration, its evaluations too.
    """

    def __init__(self, *args: object, seconds: float = 20, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.seconds = seconds
        self._last = time.monotonic()

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.train_loop, IterBasedTrainLoop):  # whose epoch stays 0
            runner.log_processor.by_epoch = self.log_metric_by_epoch = False

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Whether this iteration, counted from 0, gets a line."""
        due = super().every_n_inner_iters(batch_idx, n) or time.monotonic() - self._last >= self.seconds
        if due:
            self._last = time.monotonic()
        return due
