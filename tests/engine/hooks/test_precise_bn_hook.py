import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdet.checkpoint import load_file
from mmdet.engine.hooks.precise_bn_hook import PreciseBNHook
from mmdet.models.layers.norm import SyncBatchNorm
from mmdet.utils.config import ConfigError

SHAPES = [(2, 3, 5, 4), (1, 3, 9, 7), (3, 3, 2, 2), (2, 3, 6, 6)]


class Model(BaseModel):
    """Batch norms on the image, on a part that may be empty, and one with fixed statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.part, self.fixed = nn.BatchNorm2d(3), SyncBatchNorm(3), nn.BatchNorm2d(3).eval()

    def forward(self, inputs: Tensor, mode: str) -> dict[str, Tensor]:
        assert mode == 'loss' and not torch.is_grad_enabled()
        out = self.fixed(self.image(inputs))
        self.part(inputs[:, :, 6:, 1:] * 2 + 1)  # empty where the image is low
        return dict(loss=out.sum())


def make_runner(batches: list[Tensor], epoch: int = 0) -> SimpleNamespace:
    model = Model()
    loader = DataLoader([dict(inputs=x) for batch in batches for x in batch], collate_fn=join,
                        batch_sampler=index_batches(batches))
    return SimpleNamespace(
        bare_model=model, train_dataloader=loader, epoch=epoch, max_epochs=5, logger=logging.getLogger('bn'),
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))


def index_batches(batches: list[Tensor]) -> list[list[int]]:
    ends = torch.tensor([0] + [len(b) for b in batches]).cumsum(0).tolist()
    return [list(range(a, b)) for a, b in zip(ends, ends[1:])]


def join(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return dict(inputs=torch.stack([item['inputs'] for item in items]))


@pytest.mark.parametrize('num_iters', [2, 200])
def test_statistics_of_the_population(num_iters: int) -> None:
    batches = [torch.randn(shape) * 3 + 100 * i for i, shape in enumerate(SHAPES)]
    runner = make_runner(batches)
    norms = runner.bare_model
    PreciseBNHook(num_iters).after_train_epoch(runner)
    used = batches[:num_iters]
    for norm, seen in ((norms.image, used), (norms.part, [b[:, :, 6:, 1:] * 2 + 1 for b in used])):
        x = torch.cat([b.movedim(1, -1).reshape(-1, 3) for b in seen]).double()
        assert_close(norm.running_mean, x.mean(0))
        assert_close(norm.running_var, x.var(0))
    assert not norms.fixed.running_mean.any() and norms.fixed.num_batches_tracked == 0
    assert not norms.image._forward_pre_hooks


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_a_layer_that_saw_nothing_keeps_its_statistics() -> None:
    runner = make_runner([torch.randn(2, 3, 5, 4)])
    PreciseBNHook().after_train_epoch(runner)
    assert not runner.bare_model.part.running_mean.any()
    assert runner.bare_model.image.running_mean.all()


def test_it_comes_every_interval_and_after_the_last_epoch() -> None:
    done = []
    for epoch in range(5):
        runner = make_runner([torch.randn(2, 3, 5, 4)], epoch)
        PreciseBNHook(interval=2).after_train_epoch(runner)
        done.append(bool(runner.bare_model.image.running_mean.any()))
    assert done == [False, True, False, True, True]


def test_training_goes_on_as_without_it(toy_runner: Callable, tmp_path: Path) -> None:
    toy_runner('plain', train_cfg__max_epochs=2).train()
    toy_runner('precise', train_cfg__max_epochs=2,
               custom_hooks=[dict(type='PreciseBNHook', num_iters=2)]).train()
    plain, precise = (load_file(tmp_path / name / 'epoch_2.pth') for name in ('plain', 'precise'))
    for name, value in plain['state_dict'].items():
        if 'running' not in name and 'tracked' not in name:
            assert torch.equal(value, precise['state_dict'][name]), name
    for a, b in zip(plain['optimizer']['state'].values(), precise['optimizer']['state'].values()):
        assert torch.equal(a['momentum_buffer'], b['momentum_buffer'])
    assert not torch.equal(plain['state_dict']['bn.running_mean'], precise['state_dict']['bn.running_mean'])


@pytest.mark.parametrize('options, message', [
    (dict(num_iters=0), 'num_iters must be positive, not 0'),
    (dict(interval=-1), 'interval must be positive, not -1')])
def test_numbers_are_positive(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f'PreciseBNHook: {message}'):
        PreciseBNHook(**options)


def test_training_by_iterations_is_refused() -> None:
    message = "PreciseBNHook works at the end of epochs: use train_cfg.type='EpochBasedTrainLoop'"
    with pytest.raises(ValueError, match=message):
        PreciseBNHook().before_train(SimpleNamespace(train_loop=object()))


def test_the_config_checker_knows_it(toy_config: Callable) -> None:
    with pytest.raises(ConfigError, match=r"custom_hooks\[0\].num_iter: unknown argument of PreciseBNHook; "
                       "did you mean 'num_iters'?"):
        toy_config(custom_hooks=[dict(type='PreciseBNHook', num_iter=5)])


def test_averaged_weights_are_refused(toy_runner) -> None:
    hooks = [dict(type='PreciseBNHook'), dict(type='EMAHook')]
    with pytest.raises(ValueError, match='takes the statistics of the trained weights, and EMAHook'):
        toy_runner(custom_hooks=hooks).train()
