import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from mmdet.datasets.coco import CocoDataset
from mmdet.engine.hooks.training_hooks import BatchSizeHook, ClassesHook, EpochSeedHook, LossHook
from mmdet.models.layers.norm import SyncBatchNorm


def draws(seed: int, epoch: int, rank: int) -> tuple[float, float, float]:
    plain = SimpleNamespace(dataset=object())  # a data set that draws nothing
    hook, runner = EpochSeedHook(), SimpleNamespace(seed=seed, epoch=epoch, rank=rank, train_dataloader=plain,
                                              train_loop=None)
    hook.before_train_epoch(runner)
    torch.rand(1)  # what a loader draws when its workers start
    hook.before_train_iter(runner, batch_idx=0)
    values = (torch.rand(1).item(), float(np.random.rand()), random.random())
    hook.before_train_iter(runner, batch_idx=1)
    assert torch.rand(1).item() != values[0]
    return values


def test_draws_follow_from_seed_epoch_and_rank_alone() -> None:
    assert draws(3, 1, 0) == draws(3, 1, 0)
    others = [draws(3, 1, 1), draws(3, 2, 0), draws(4, 1, 0), draws(2, 1, 1), draws(3, 1, 0)]
    for values in zip(*others):
        assert len(set(values)) == len(values)


def test_augmentation_is_drawn_anew_each_epoch() -> None:
    dataset = CocoDataset('none.json', lazy_init=True)
    dataset.get_data_info = lambda idx: dict(sample_idx=idx)
    dataset.pipeline = lambda results: results['rng'].random()
    runner = SimpleNamespace(seed=3, epoch=0, rank=1, train_loop=None,
                             train_dataloader=SimpleNamespace(dataset=dataset))
    for runner.epoch in (0, 1):
        EpochSeedHook().before_train_epoch(runner)
        assert dataset.prepare_data(5) == np.random.default_rng((3, runner.epoch, 5)).random()


def test_heads_and_data_set_have_the_same_classes() -> None:
    model = torch.nn.ModuleDict(dict(bbox_head=torch.nn.Module()))
    model.bbox_head.num_classes = 3
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c')), ann_file='val.json')
    loader = SimpleNamespace(dataset=dataset)
    runner = SimpleNamespace(
        bare_model=model, val_loop=None, train_dataloader=loader, test_dataloader=loader)
    ClassesHook().before_train(runner)
    dataset.metainfo['classes'] = ('a', 'b')
    message = r'model.bbox_head.num_classes is 3, but val.json is read with 2 classes: set'
    for check in (ClassesHook().before_train, ClassesHook().before_test):
        with pytest.raises(ValueError, match=message):
            check(runner)


def test_a_loss_that_is_no_number_stops_training() -> None:
    runner = SimpleNamespace(epoch=1, work_dir='w')
    losses = dict(
        loss=torch.tensor(float('nan')), loss_cls=torch.tensor(0.5), loss_mask=torch.tensor(float('nan'))
    )
    with pytest.raises(FloatingPointError) as error:
        LossHook().after_train_iter(runner, batch_idx=6, outputs=losses)
    assert str(error.value).startswith(
        'the loss is not finite at epoch 2, iteration 7 (loss nan, loss_cls 0.5, loss_mask nan): lower '
        'optim_wrapper.optimizer.lr'
    )


def test_finite_losses_pass_unchanged() -> None:
    losses = dict(loss=torch.tensor(2.0), acc=torch.tensor([50.0])[0])
    LossHook().after_train_iter(SimpleNamespace(), batch_idx=0, outputs=losses)
    assert {name: value.item() for name, value in losses.items()} == dict(loss=2.0, acc=50.0)


class FixedNorm(nn.BatchNorm2d):
    """Stays in eval mode."""

    def train(self, mode: bool = True) -> 'FixedNorm':
        return super().train(False)


@pytest.mark.parametrize('norm, batch, processes, number', [
    (nn.BatchNorm2d, 4, 2, 4), (nn.BatchNorm2d, 4, 8, 4), (nn.BatchNorm2d, 8, 1, None),
    (SyncBatchNorm, 2, 3, 6), (SyncBatchNorm, 1, 8, None), (FixedNorm, 1, 1, None)])
def test_few_images_for_batch_norm(caplog: pytest.LogCaptureFixture, norm: type[nn.Module], batch: int,
                                   processes: int, number: int | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(norm(3), norm(3))).eval()
    runner = SimpleNamespace(
        model=model, bare_model=model, world_size=processes, logger=logging.getLogger('few images'),
        train_dataloader=SimpleNamespace(batch_sampler=SimpleNamespace(batch_size=batch)))
    BatchSizeHook().before_train(runner)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (number is not None)
    if said:
        assert said[0].startswith(f'Trained batch norm (layers: 2, first: 1.0) has statistics of {number} im')


def test_augmentation_in_wrapped_data_sets_and_by_iteration() -> None:
    parts = []
    for _ in range(2):
        parts.append(CocoDataset('none.json', lazy_init=True))
        parts[-1].get_data_info = lambda idx: dict(sample_idx=idx)
        parts[-1].pipeline = lambda results: results['rng'].random()
    runner = SimpleNamespace(seed=3, rank=0, train_loop=None, train_dataloader=SimpleNamespace())
    for runner.epoch, wrapped in enumerate([
            ConcatDataset(parts, lazy_init=True), RepeatDataset(parts[0], 2, lazy_init=True)]):
        runner.train_dataloader.dataset = wrapped
        EpochSeedHook().before_train_epoch(runner)
        assert parts[0].prepare_data(5) == np.random.default_rng((3, runner.epoch, 5)).random()
    assert parts[1].prepare_data(5) == np.random.default_rng((3, 0, 5)).random()

    runner.train_loop = object.__new__(IterBasedTrainLoop)
    drawn = []
    for _ in range(2):
        EpochSeedHook().before_train_epoch(runner)
        drawn.append([parts[0].prepare_data(5) for _ in range(3)])  # one image in three passes
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_a_validation_with_classes_in_another_order_is_refused() -> None:
    train, val = (SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=classes)))
                  for classes in (('a', 'b'), ('b', 'a')))
    runner = SimpleNamespace(bare_model=nn.Identity(), val_loop=1, train_dataloader=train, val_dataloader=val)
    with pytest.raises(ValueError, match="class 'b' of val_dataloader.dataset.metainfo.classes is where"):
        ClassesHook().before_train(runner)
