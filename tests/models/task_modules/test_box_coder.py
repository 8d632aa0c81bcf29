import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from mmdet.models.task_modules.box_coder import DeltaXYWHBBoxCoder

STDS = (0.1, 0.1, 0.2, 0.2)
HUGE = (10**6, 10**6)


def random_boxes(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    corner = torch.rand(number, 2, dtype=dtype) * 100
    return torch.cat([corner, corner + torch.rand(number, 2, dtype=dtype) * 80 + 5], dim=1)


def test_encoding_is_torchvisions() -> None:
    proposals, targets = random_boxes(50), random_boxes(50)
    expected = BoxCoder(weights=tuple(1 / s for s in STDS)).encode_single(targets, proposals)
    found = DeltaXYWHBBoxCoder(target_stds=STDS).encode(proposals, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_decoding_is_torchvisions() -> None:
    proposals, deltas = random_boxes(50, torch.float64) + 1000, torch.randn(50, 4, dtype=torch.float64)
    reference = BoxCoder(weights=tuple(1 / s for s in STDS), bbox_xform_clip=abs(math.log(16 / 1000)))
    expected = reference.decode_single(deltas, proposals)
    found = DeltaXYWHBBoxCoder(target_stds=STDS).decode(proposals, deltas, HUGE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_by_hand() -> None:
    coder = DeltaXYWHBBoxCoder(target_means=(0.5, 0, 0, 0), target_stds=(0.1, 0.1, 0.2, 0.2))
    proposal, target = torch.tensor([[10., 20., 30., 60.]]), torch.tensor([[20., 20., 60., 60.]])
    # Centres 20, 40 and 40, 40; sizes 20 x 40 and 40 x 40.
    expected = torch.tensor([[(20 / 20 - 0.5) / 0.1, 0, math.log(2) / 0.2, 0]])
    torch.testing.assert_close(coder.encode(proposal, target), expected)
    torch.testing.assert_close(coder.decode(proposal, expected, HUGE), target)


def test_round_trip() -> None:
    proposals, targets = random_boxes(100), random_boxes(100)
    coder = DeltaXYWHBBoxCoder(target_stds=STDS)
    torch.testing.assert_close(
        coder.decode(proposals, coder.encode(proposals, targets), HUGE), targets, rtol=1e-5, atol=1e-4)


def test_sizes_are_clamped_both_ways_and_offsets_are_not() -> None:
    proposal = torch.tensor([[1000., 1000., 1016., 1016.]], dtype=torch.float64)
    decode = DeltaXYWHBBoxCoder().decode
    large = decode(proposal, torch.tensor([[0, 0, 100., 100.]], dtype=torch.float64), HUGE)
    torch.testing.assert_close(large, torch.tensor([[508., 508., 1508., 1508.]], dtype=torch.float64))
    small = decode(proposal, torch.tensor([[0, 0, -100., -100.]], dtype=torch.float64), HUGE)
    torch.testing.assert_close(
        small[:, 2:] - small[:, :2], torch.full((1, 2), 16 * 16 / 1000, dtype=torch.float64))
    moved = decode(proposal, torch.tensor([[50., 0, 0, 0]], dtype=torch.float64), HUGE)
    torch.testing.assert_close(moved, torch.tensor([[1800., 1000., 1816., 1016.]], dtype=torch.float64))


def test_decoded_boxes_are_cut_at_the_image() -> None:
    proposals = torch.tensor([[-5., -5., 60., 70.]])
    found = DeltaXYWHBBoxCoder().decode(proposals, torch.zeros(1, 4), (40, 50))
    assert found.tolist() == [[0, 0, 50, 40]]


def test_one_proposal_has_a_box_for_each_class() -> None:
    proposals, deltas = random_boxes(7), torch.randn(7, 3, 4)
    coder = DeltaXYWHBBoxCoder(target_stds=STDS)
    found = coder.decode(proposals[:, None], deltas, HUGE)
    for i in range(3):
        torch.testing.assert_close(found[:, i], coder.decode(proposals, deltas[:, i], HUGE))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_targets_are_float32(dtype: torch.dtype) -> None:
    assert DeltaXYWHBBoxCoder().encode(random_boxes(0, dtype), random_boxes(0, dtype)).dtype == torch.float32
