from pathlib import Path
from typing import Any

import compare_golden as tool
import pytest
import torch
from comparison import Comparison
from torch import nn

from mmdet.registry import MODELS
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.shared('published_keys')
@pytest.mark.parametrize('spelling', ['4conv1f', '4conv1fc'])
@pytest.mark.parametrize('stem', [
    'mask_rcnn_r50_fpn_syncbn_{}_syncbn_1x', 'mask_rcnn_r16_gcb_c3-c5_r50_fpn_syncbn_{}_syncbn_1x',
    'mask_rcnn_r4_gcb_c3-c5_r50_fpn_syncbn_{}_syncbn_1x'])
def test_published_names_in_both_spellings(spelling: str, stem: str, shared_dir: Path) -> None:
    found = tool.published_shapes(shared_dir / 'published_keys', f'r50/{stem.format(spelling)}.py')
    assert found['bbox_head.shared_convs.3.conv.weight'] == [256, 256, 3, 3]


def test_a_name_that_was_not_published(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='mask_rcnn_r51.json'):
        tool.published_shapes(tmp_path, 'mask_rcnn_r51.py')


def test_weights_of_another_config(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(ROOT / 'configs' / 'gcnet' / 'mask_rcnn_r50_fpn_1x.py')
    monkeypatch.setattr(MODELS, 'build', lambda cfg: nn.Linear(2, 3))
    with pytest.raises(ValueError, match='size mismatch.*another config') as error:
        tool.golden_model(cfg, dict(weight=torch.zeros(3, 3), bias=torch.zeros(3)))
    assert '\n' not in str(error.value)


class Scaled(nn.Module):
    """Losses of given sizes; their gradient by ``a`` is 3, by ``b`` 4."""

    def __init__(self, **losses: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
        self.losses = losses

    def data_preprocessor(self, batch: Any, training: bool) -> dict[str, Any]:
        return dict(inputs=torch.arange(4.0), data_samples=[])

    def forward(self, inputs: Any, data_samples: Any, mode: str) -> dict[str, torch.Tensor]:
        moved = 3 * (self.a - self.a.detach()) + 4 * (self.b - self.b.detach())
        return {name: value + moved if 'cls' in name else torch.tensor(value)
                for name, value in self.losses.items()}


def failed(noisy: bool, losses: dict[str, float], grads: dict[str, float]) -> list[str]:
    wide = torch.arange(4.0)
    image = dict(shape=[4], mean=1.5, std=wide.std().item(), absmax=3.0, head=[0.0, 1.0])
    inputs: dict[str, Any] = dict(img=image, gt_bboxes=[], gt_labels=[], gt_bboxes_ignore=[], gt_masks=[])
    reference = dict(train_inputs=inputs, losses={'s0.loss_cls': [1.5, 0.5], 's0.acc': 0.0}, grads=grads,
                     grad_total_norm=5.0, no_grad_params=0)
    out = Comparison()
    tool.compare_training(Scaled(**losses), {}, reference, noisy, out)
    assert len(out.rows) == 6
    return [name.split(' (')[0] for name in out.failed]


EXACT = {'s0.loss_cls': 2.0, 's0.acc': 0.0}


@pytest.mark.parametrize('noisy, losses, grads, expected', [
    (False, EXACT, dict(a=3.0, b=4.0), []),
    (False, {**EXACT, 's0.loss_cls': 2.002}, dict(a=3.0, b=4.0), ['s0.loss_cls']),
    (False, {**EXACT, 's0.acc': 0.1}, dict(a=3.0, b=4.0), ['s0.acc']),
    (False, EXACT, dict(a=3.0, b=4.1), ['gradient norms']),
    (True, {'s0.loss_cls': 2.1, 's0.acc': 0.4}, dict(a=3.3, b=4.4), []),
    (True, {**EXACT, 's0.loss_cls': 2.3}, dict(a=3.0, b=4.0), ['s0.loss_cls']),
    (True, EXACT, dict(a=6.0, b=8.0), ['gradient norms'])])
def test_losses_of_models_with_noise_are_compared_loosely(
        noisy: bool, losses: dict[str, float], grads: dict[str, float], expected: list[str]) -> None:
    assert failed(noisy, losses, grads) == expected


def test_losses_of_another_config() -> None:
    with pytest.raises(ValueError, match='another config'):
        failed(False, {'loss_cls': 2.0}, dict(a=3.0))
