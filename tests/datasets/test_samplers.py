"""AspectRatioBatchSampler by its promises, and the whole loader: same items for any number of workers."""
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmdet.datasets.samplers import AspectRatioBatchSampler


class Shapes(Dataset):
    """As much of CocoDataset as the sampler sees; sizes are (height, width)."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def get_data_info(self, i: int) -> dict[str, int]:
        return dict(height=self.sizes[i][0], width=self.sizes[i][1])


def batches_of_ranks(sizes: list, batch_size: int, world_size: int, epoch: int = 0, **args: Any) -> list:
    ranks = []
    for rank in range(world_size):
        sampler = DefaultSampler(Shapes(sizes), **dict(seed=5) | args)
        sampler.rank, sampler.world_size = rank, world_size
        batch_sampler = AspectRatioBatchSampler(sampler, batch_size)
        batch_sampler.sampler.set_epoch(epoch)
        ranks.append(list(batch_sampler))
        assert len(ranks[-1]) == len(batch_sampler)
    return ranks


WIDE, TALL = (3, 4), (4, 3)


@pytest.mark.parametrize('wide, tall', [(11, 5), (1, 0), (0, 1), (1, 1), (2, 7), (16, 16), (0, 3)])
@pytest.mark.parametrize('batch_size, world_size', [(1, 1), (2, 1), (2, 2), (4, 3), (3, 8)])
def test_promises(wide, tall, batch_size, world_size):
    sizes = [WIDE] * wide + [TALL] * tall
    ranks = batches_of_ranks(sizes, batch_size, world_size)
    assert len({len(rank) for rank in ranks}) == 1
    batches = list(itertools.chain(*ranks))
    assert all(len(batch) == batch_size for batch in batches)
    assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
    assert {i for batch in batches for i in batch} == set(range(len(sizes)))
    # No more than needed: full batches of both groups, up to a multiple of the number of processes.
    full = -(-wide // batch_size) - (-tall // batch_size)
    assert len(batches) == -(-full // world_size) * world_size


def test_square_images_go_with_the_tall():
    assert {frozenset(b) for b in batches_of_ranks([WIDE, (3, 3), TALL, WIDE], 2, 1)[0]} == {
        frozenset({0, 3}), frozenset({1, 2})}


def test_order_follows_seed_and_epoch_alone():
    sizes = [WIDE] * 20 + [TALL] * 20
    first = batches_of_ranks(sizes, 2, 1, epoch=0)[0]
    assert first == batches_of_ranks(sizes, 2, 1, epoch=0)[0]
    assert first != batches_of_ranks(sizes, 2, 1, epoch=1)[0]
    assert first != batches_of_ranks(sizes, 2, 1, epoch=0, seed=6)[0]
    two = batches_of_ranks(sizes, 2, 2, epoch=0)
    assert [batch for pair in zip(*two) for batch in pair] == first  # one order, dealt out to the processes
    groups = [sizes[batch[0]] for batch in first]
    assert groups != sorted(groups) and groups != sorted(groups, reverse=True)
    assert batches_of_ranks(sizes, 2, 1, shuffle=False)[0] == [[i, i + 1] for i in range(0, 40, 2)]


def test_every_batch_comes_first_about_as_often():
    sizes = [WIDE] * 4 + [TALL] * 4
    first = [batches_of_ranks(sizes, 1, 1, epoch)[0][0][0] for epoch in range(400)]
    counts = np.bincount(first, minlength=8)
    assert (np.abs(counts - 50) < 30).all()  # 50 each, 4.5 standard deviations


def test_wrong_arguments():
    with pytest.raises(ValueError, match='needs sampler.type=DefaultSampler, not '):
        AspectRatioBatchSampler(torch.utils.data.SequentialSampler(Shapes([WIDE])), 2)
    with pytest.raises(ValueError, match='batch_size must be a positive integer, not 0'):
        AspectRatioBatchSampler(DefaultSampler(Shapes([WIDE]), seed=0), 0)


def loader_config(args: dict[str, Any], num_workers: int, persistent: bool) -> dict[str, Any]:
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_mask=True),
        dict(type='RandomChoiceResize', scales=[(64, 48), (80, 64), (100, 90)]),
        dict(type='RandomFlip'),
        dict(type='PackDetInputs'),
    ]
    return dict(
        batch_size=2, num_workers=num_workers, persistent_workers=persistent,
        sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=dict(type='mmdet.AspectRatioBatchSampler'),
        dataset=dict(type='mmdet.CocoDataset', pipeline=pipeline, **args))


def epochs(config: dict[str, Any], which: range, seed: int = 3) -> list[list[tuple]]:
    """What mmengine's loader gives, with the epoch set as by DistSamplerSeedHook and EpochSeedHook."""
    loader = Runner.build_dataloader(config, seed=seed)
    loader.dataset.set_seed(seed)
    seen = []
    for epoch in which:
        loader.batch_sampler.sampler.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        seen.append([
            (sample.img_id, sample.flip, sample.img_shape, int(inputs.sum()), sample.boxes.tolist(),
             int(sample.masks.pixels.sum()))
            for batch in loader for inputs, sample in zip(batch['inputs'], batch['data_samples'])])
    return seen


def test_items_depend_on_neither_workers_nor_resuming(make_coco):
    args = make_coco([dict(image_id=i) for i in range(7)], [(40, 50)] * 4 + [(50, 40)] * 3)
    expected = epochs(loader_config(args, 0, False), range(4))
    draws = [{(i, flip, shape) for i, flip, shape, *_ in epoch} for epoch in expected]
    assert len({frozenset(d) for d in draws}) == 4  # another augmentation each epoch
    assert epochs(loader_config(args, 1, True), range(4)) == expected
    assert epochs(loader_config(args, 2, True), range(4)) == expected
    assert epochs(loader_config(args, 2, False), range(2, 4)) == expected[2:]  # resumed
    assert epochs(loader_config(args, 0, False), range(2), seed=4) != expected[:2]
