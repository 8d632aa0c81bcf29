"""Masks encoded beside the network."""

from concurrent.futures import ThreadPoolExecutor

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet.models.roi_heads.mask_head import FCNMaskHead
from mmdet.registry import HOOKS


@HOOKS.register_module()
class EncodeHook(Hook):
    """While a data set is tested, encode the masks of a batch in a thread of its own.

    The network goes on with the next batch meanwhile; ``CocoMetric`` lags behind by one. Other metrics and
    hooks get futures of the masks, for which ``mmdet.structures.masks.finished`` waits.
    """

    def before_val(self, runner: Runner) -> None:
        self.encoder = ThreadPoolExecutor(1, 'encode')
        self._set(runner, self.encoder)

    def after_val(self, runner: Runner) -> None:
        self._set(runner, None)
        self.encoder.shutdown()

    before_test, after_test = before_val, after_val

    @staticmethod
    def _set(runner: Runner, encoder: ThreadPoolExecutor | None) -> None:
        for module in runner.bare_model.modules():
            if isinstance(module, FCNMaskHead):
                module.encoder = encoder
