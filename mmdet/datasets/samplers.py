"""Batches of images with similar aspect ratio, so that little of a batch is padding."""

from collections.abc import Iterator

import numpy as np
from mmengine.dataset import DefaultSampler
from torch.utils.data import Sampler

from mmdet.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class AspectRatioBatchSampler(Sampler[list[int]]):
    """Cuts each epoch into full batches that hold wide (width > height) or other images only.

    The last batch of each of the two groups is filled up with images of that group, and batches are
    repeated until every process has the same number. So every image comes at least once an epoch,
    and no process waits for another. The batches depend on (seed, epoch) alone.

    Args:
        sampler: says which data set, seed, epoch, process, and whether to shuffle. Its own order is
            not used: processes that group their own shares get different numbers of batches.
        batch_size: images per batch and process.

    Raises:
        ValueError: ``sampler`` is not mmengine's DefaultSampler, or ``batch_size`` no positive integer.
    """

    def __init__(self, sampler: DefaultSampler, batch_size: int) -> None:
        if not isinstance(sampler, DefaultSampler):
            raise ValueError('AspectRatioBatchSampler needs sampler.type=DefaultSampler, not '
                             f'{type(sampler).__name__}')
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f'batch_size must be a positive integer, not {batch_size!r}')
        self.sampler = sampler
        self.batch_size = batch_size
        infos = map(sampler.dataset.get_data_info, range(len(sampler.dataset)))
        wide = np.array([info['width'] > info['height'] for info in infos])
        self.groups = [group for group in (np.flatnonzero(wide), np.flatnonzero(~wide)) if len(group)]

    def __len__(self) -> int:
        """Batches per process and epoch."""
        batches = sum(-(-len(group) // self.batch_size) for group in self.groups)
        return -(-batches // self.sampler.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this process in the sampler's current epoch."""
        rng = np.random.default_rng((self.sampler.seed, self.sampler.epoch))
        shuffled = rng.permutation if self.sampler.shuffle else np.asarray
        batches = shuffled(np.concatenate([self._cut(shuffled(group)) for group in self.groups]))
        rank, world_size = self.sampler.rank, self.sampler.world_size
        mine = np.arange(rank, len(self) * world_size, world_size) % len(batches)
        return iter(batches[mine].tolist())

    def _cut(self, group: np.ndarray) -> np.ndarray:
        """Indices (n,) to batches (ceil(n / batch_size), batch_size), filled up by repetition."""
        batches = -(-len(group) // self.batch_size)
        return np.resize(group, (batches, self.batch_size))
