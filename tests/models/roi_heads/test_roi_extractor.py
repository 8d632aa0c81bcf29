import pytest
import torch
import torchvision
from torch import Tensor

from mmdet.models.roi_heads.roi_extractor import SingleRoIExtractor

STRIDES = [4, 8, 16, 32]


def make(sampling_ratio: int | None = None, **options: int) -> SingleRoIExtractor:
    layer = dict(type='RoIAlign', output_size=7)
    if sampling_ratio is not None:
        layer['sampling_ratio'] = sampling_ratio
    return SingleRoIExtractor(layer, out_channels=3, featmap_strides=STRIDES, **options)


def square(side: float) -> Tensor:
    return torch.tensor([[0.0, 5, 5, 5 + side, 5 + side]])


def levels_of(extractor: SingleRoIExtractor, rois: Tensor) -> list[int]:
    """The level that each RoI is pooled from, read off levels that hold their number; -1: from none."""
    features = [torch.full((1, 3, 1, 1), float(i + 1)) for i in range(len(STRIDES))]
    extractor.strides = [10_000] * len(STRIDES)  # all samples are in the one cell
    return (extractor(features, rois).mean(dim=(1, 2, 3)) - 1).round().long().tolist()


@pytest.mark.parametrize('side, level', [
    (0, 0), (1, 0), (55, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (447.9, 2), (448, 3), (2000, 3)])
def test_levels_by_size(side: float, level: int) -> None:
    assert levels_of(make(2), square(side)) == [level]
    # The area counts, not the longer side.
    assert levels_of(make(2), torch.tensor([[0.0, 0, 0, side * 2, side / 2]])) == [level]


def test_finest_scale() -> None:
    rois = torch.cat([square(side) for side in (31.9, 32, 64, 128)])
    assert levels_of(make(2, finest_scale=16), rois) == [0, 1, 2, 3]


def test_a_rounding_error_below_a_level_counts_as_reaching_it() -> None:
    """What mmdetection's `floor(log2(scale / finest_scale + 1e-6))` gives, exactly."""
    sides = 56 * 2.0 ** torch.arange(4)[:, None] * (1 + torch.linspace(-3e-6, 3e-6, 1001))
    corner = sides.flatten()[:, None].expand(-1, 2)
    rois = torch.cat([torch.zeros(len(corner), 3), corner], dim=1)
    scale = (corner[:, 0] * corner[:, 1]).sqrt()
    expected, exact = (torch.floor(torch.log2(scale / 56 + more)).clamp(0, 3).long() for more in (1e-6, 0))
    assert levels_of(make(2), rois) == expected.tolist() != exact.tolist()


@pytest.mark.parametrize('sampling_ratio', [None, 0, 2])
def test_each_roi_is_torchvisions_on_its_level(sampling_ratio: int | None) -> None:
    features = [torch.randn(2, 3, 256 // s, 320 // s).double().requires_grad_() for s in STRIDES]
    corner = torch.rand(30, 2, dtype=torch.float64) * 150
    size = 2 ** (torch.rand(30, 2, dtype=torch.float64) * 6 + 3)
    rois = torch.cat([torch.randint(0, 2, (30, 1)), corner, corner + size], dim=1)
    extractor = make(sampling_ratio, finest_scale=16)
    found = extractor(features, rois)
    expected = []
    for roi in rois:
        scale = ((roi[3] - roi[1]) * (roi[4] - roi[2])).item() ** 0.5
        level = sum(scale >= bound for bound in (32, 64, 128))
        expected.append(torchvision.ops.roi_align(
            features[level], roi[None], 7, 1 / STRIDES[level], sampling_ratio or 0, aligned=True))
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, features, weight),
        torch.autograd.grad(torch.cat(expected), features, weight), rtol=0, atol=1e-12)


def test_levels_without_rois_have_a_gradient() -> None:
    features = [torch.randn(1, 3, 64 // s * 4, 64 // s * 4, requires_grad=True) for s in STRIDES]
    out = make()(features, torch.zeros(0, 5))
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert all(f.grad is not None and (f.grad == 0).all() for f in features)


def test_rois_of_a_diverged_network_pool_zeros() -> None:
    features = [torch.randn(1, 3, 256 // s, 256 // s) for s in STRIDES]
    rois = torch.tensor([[0, float('nan'), 5, 60, 60], [0, 60, 5, 5, 60], [0, 5, 5, 60, 60]])
    assert levels_of(make(2), rois) == [-1, -1, 0]
    pooled = make(2, shift=0.5)(features, rois)
    assert pooled[:2].count_nonzero() == 0 and pooled[2].count_nonzero() == 3 * 7 * 7


def test_shift_is_in_cells_of_the_level() -> None:
    features = [torch.randn(1, 3, 1024 // s, 1024 // s).double() for s in STRIDES]
    rois = torch.cat([square(side) for side in (50, 150, 300, 500)]).double()
    moved = rois.clone()
    moved[:, 1:] += torch.tensor(STRIDES)[:, None] / 2
    # The levels are those of the RoIs as they came.
    torch.testing.assert_close(make(2, shift=0.5)(features, rois), make(2)(features, moved))


def test_more_strides_than_levels() -> None:
    with pytest.raises(ValueError, match=r'featmap_strides=.*: the pyramid has 1 levels'):
        make(2)([torch.zeros(1, 3, 4, 4)], square(10))
