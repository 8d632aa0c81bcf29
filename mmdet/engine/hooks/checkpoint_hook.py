"""When checkpoints are written and removed."""

from pathlib import Path
from typing import Any

import mmengine.hooks
from mmengine.dist import is_main_process
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmdet.engine.hooks.training_hooks import broadcast_buffers
from mmdet.registry import HOOKS
from mmdet.utils.files import write_file


@HOOKS.register_module()
class CheckpointHook(mmengine.hooks.CheckpointHook):
    """mmengine's, but an old checkpoint is removed only when the new one is whole on disk.

    That of ``save_best`` alone goes before. All processes go on with the buffers of the first, which are
    those in the file. ``meta['batches']`` of one that is written within an epoch (``by_epoch=False``) says
    how many of its batches are done.
    """

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        broadcast_buffers(runner.model)
        if not self.by_epoch and isinstance(runner.train_loop, EpochBasedTrainLoop):
            # Also in a resumed training: DetectionRunner.resume sets the iteration to that of whole epochs.
            epochs, batches = divmod(meta['iter'], len(runner.train_dataloader))
            meta = meta | dict(epoch=epochs, batches=batches)
        folder, name = Path(self.out_dir), self.filename_tmpl.format(step)
        folder.mkdir(parents=True, exist_ok=True)
        outdated = []
        if self.max_keep_ckpts > 0:
            steps = [kept for kept in self.keep_ckpt_ids if kept != step] + [step]
            outdated = [self.filename_tmpl.format(old) for old in steps[:-self.max_keep_ckpts]]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(steps[-self.max_keep_ckpts:])
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.last_ckpt = str(folder / name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir, name, save_optimizer=self.save_optimizer, meta=meta, by_epoch=self.by_epoch)
        if is_main_process():
            write_file(Path(runner.work_dir, 'last_checkpoint'), self.last_ckpt.encode())
            for old in outdated:
                (folder / old).unlink(missing_ok=True)
