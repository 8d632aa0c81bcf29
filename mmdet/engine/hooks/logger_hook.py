"""Progress in the console and in the log files."""

import time

import mmengine.hooks

from mmdet.registry import HOOKS


@HOOKS.register_module()
class LoggerHook(mmengine.hooks.LoggerHook):
    """mmengine's log lines every ``interval`` iterations, and at least every ``seconds`` seconds."""

    def __init__(self, *args: object, seconds: float = 20, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.seconds = seconds
        self._last = time.monotonic()

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Whether this iteration, counted from 0, gets a line."""
        due = super().every_n_inner_iters(batch_idx, n) or time.monotonic() - self._last >= self.seconds
        if due:
            self._last = time.monotonic()
        return due
