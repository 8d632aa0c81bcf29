from collections import deque
from pathlib import Path

from torch import nn

from mmdet.engine.hooks.checkpoint_hook import CheckpointHook


class Recorder:
    """A runner that notes which checkpoints exist while it writes the next."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = str(work_dir)
        self.model = nn.BatchNorm2d(1)
        self.present: list[list[str]] = []
        self.message_hub = self
        self.runtime_info: dict = {}

    def update_info(self, key: str, value: object) -> None:
        self.runtime_info[key] = value

    def get_info(self, key: str) -> object:
        return self.runtime_info[key]

    def save_checkpoint(self, out_dir: str, filename: str, **kwargs: object) -> None:
        self.present.append(sorted(path.name for path in Path(out_dir).glob('*.pth')))
        Path(out_dir, filename).touch()


def test_an_old_checkpoint_goes_when_the_new_one_is_whole(tmp_path: Path) -> None:
    hook, runner = CheckpointHook(max_keep_ckpts=1), Recorder(tmp_path)
    hook.out_dir = str(tmp_path)
    hook.keep_ckpt_ids = deque(maxlen=1)
    for step in (1, 2, 3):
        hook._save_checkpoint_with_step(runner, step, {})
    assert runner.present == [[], ['epoch_1.pth'], ['epoch_2.pth']]
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_3.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_3.pth')


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    hook, runner = CheckpointHook(max_keep_ckpts=2), Recorder(tmp_path)
    hook.out_dir = str(tmp_path)
    hook.keep_ckpt_ids = deque([1], maxlen=2)
    (tmp_path / 'epoch_1.pth').touch()
    for step in (2, 2, 3):
        hook._save_checkpoint_with_step(runner, step, {})
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['epoch_2.pth', 'epoch_3.pth']
    assert runner.runtime_info['keep_ckpt_ids'] == [2, 3]
