import pytest
import torch

from mmdet.models.task_modules.assigner import BACKGROUND, IGNORED
from mmdet.models.task_modules.sampler import RandomSampler, random_choice


def assignment(positives: int, negatives: int, ignored: int = 5) -> torch.Tensor:
    assigned = torch.cat([torch.arange(positives), torch.full((negatives,), BACKGROUND),
                          torch.full((ignored,), IGNORED)])
    return assigned[torch.randperm(len(assigned))]


@pytest.mark.parametrize('positives, negatives, options, expected', [
    (100, 500, dict(num=64, pos_fraction=0.25), (16, 48)),
    (3, 500, dict(num=64, pos_fraction=0.25), (3, 61)),  # negatives fill up
    (3, 20, dict(num=64, pos_fraction=0.25), (3, 20)),  # fewer than asked for
    (100, 0, dict(num=64, pos_fraction=0.25), (16, 0)),  # positives do not
    (0, 500, dict(num=64, pos_fraction=0.25), (0, 64)),
    (3, 500, dict(num=64, pos_fraction=0.25, neg_pos_ub=3), (3, 9)),
    (0, 500, dict(num=64, pos_fraction=0.25, neg_pos_ub=3), (0, 3)),  # as if there were one
    (3, 500, dict(num=64, pos_fraction=0.25, neg_pos_ub=0), (3, 0)),
    (100, 100, dict(num=7, pos_fraction=0.5), (3, 4)),
    (0, 0, dict(num=64, pos_fraction=0.25), (0, 0)),
])
def test_numbers(positives: int, negatives: int, options: dict, expected: tuple[int, int]) -> None:
    assigned = assignment(positives, negatives)
    [(positive, negative)] = RandomSampler(**options).sample([assigned])
    assert (len(positive), len(negative)) == expected
    assert (assigned[positive] >= 0).all() and (assigned[negative] == BACKGROUND).all()
    chosen = torch.cat([positive, negative])
    assert len(chosen.unique()) == len(chosen)


def test_images_are_sampled_one_by_one() -> None:
    assigned = [assignment(10, 50), assignment(0, 7), assignment(2, 0), torch.zeros(0, dtype=torch.int64)]
    found = RandomSampler(12, 0.25).sample(assigned)
    assert [(len(p), len(n)) for p, n in found] == [(3, 9), (0, 7), (2, 0), (0, 0)]
    for image, (positive, negative) in zip(assigned, found):
        assert (image[positive] >= 0).all() and (image[negative] == BACKGROUND).all()


@pytest.mark.parametrize('num', [5, 19])
def test_each_is_as_likely(num: int) -> None:
    counts = torch.zeros(20)
    for _ in range(2000):
        chosen = random_choice(20, num)
        assert len(chosen.unique()) == num
        counts[chosen] += 1
    # Of 5: 500 each; the standard deviation is sqrt(2000 * 1/4 * 3/4) = 19.
    assert (counts - 100 * num).abs().max() < 90


def test_the_order_is_random_too() -> None:
    first = torch.stack([random_choice(4, 3)[0] for _ in range(1000)]).bincount(minlength=4)
    assert (first - 250).abs().max() < 70  # the standard deviation is 14


def test_a_seed_means_the_same_choice() -> None:
    torch.manual_seed(3)
    first = random_choice(100, 10)
    torch.manual_seed(3)
    assert torch.equal(first, random_choice(100, 10))
    assert not torch.equal(first, random_choice(100, 10))


@pytest.mark.parametrize('options', [
    dict(num=0, pos_fraction=0.5), dict(num=8, pos_fraction=2.0), dict(num=8, pos_fraction=-0.1)])
def test_values_that_cannot_be(options: dict) -> None:
    with pytest.raises(ValueError, match=r'^RandomSampler: num='):
        RandomSampler(**options)
