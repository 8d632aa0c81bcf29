import json
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from mmdet.models.task_modules.anchor_generator import AnchorGenerator

GCNET = dict(strides=[4, 8, 16, 32, 64], ratios=[0.5, 1.0, 2.0], scales=[8])


@pytest.mark.shared('reference')
@pytest.mark.parametrize('name, bound', [('gcb_r4_r50_f64', 1e-12), ('plain_r50_f32', 3e-5)])
def test_base_anchors_are_the_recorded_ones(shared_dir: Path, name: str, bound: float) -> None:
    recorded = json.loads((shared_dir / 'reference' / f'{name}.json').read_text())['base_anchors']
    generator = AnchorGenerator(**GCNET)
    for stride, expected in zip(GCNET['strides'], recorded, strict=True):
        torch.testing.assert_close(
            generator.base_anchors(stride), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=bound)


def test_grid_is_torchvisions() -> None:
    # Whole numbers, since torchvision rounds.
    generator = AnchorGenerator(strides=[4, 8], ratios=[0.25, 1.0, 4.0], scales=[8])
    features = [torch.zeros(1, 1, 10, 14), torch.zeros(1, 1, 5, 7)]
    reference = TorchvisionAnchors(sizes=((32,), (64,)), aspect_ratios=((0.25, 1.0, 4.0),) * 2)
    expected, = reference(ImageList(torch.zeros(1, 3, 40, 56), [(40, 56)]), features)
    torch.testing.assert_close(
        torch.cat(generator.grid_anchors(features, torch.float32)), expected, rtol=0, atol=0)


def test_scales_lie_inside_ratios() -> None:
    anchors = AnchorGenerator(strides=[4], ratios=[1.0, 4.0], scales=[2, 4]).base_anchors(4)
    sizes = (anchors[:, 2:] - anchors[:, :2]).tolist()
    assert sizes == [[8, 8], [16, 16], [4, 16], [8, 32]]


def test_valid_flags_by_hand() -> None:
    generator = AnchorGenerator(strides=[4, 8], ratios=[1.0, 2.0], scales=[8])
    features = [torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 2)]
    # 10 x 8 pixels: ceil(10 / 4) = 3 and 2 rows, 2 and 1 columns; two anchors a cell.
    first = torch.tensor([[1, 1, 0, 0]] * 3).flatten().repeat_interleave(2)
    second = torch.tensor([[1, 0]] * 2).flatten().repeat_interleave(2)
    found = generator.valid_flags(features, [(10, 8), (12, 16)])
    assert found.dtype == torch.bool
    assert found.int().tolist() == [torch.cat([first, second]).tolist(), [1] * (12 + 4) * 2]


def test_levels_must_fit_the_strides() -> None:
    with pytest.raises(ValueError, match=r'anchor_generator.strides=\[4, 8\] does not fit 1 levels'):
        AnchorGenerator([4, 8], [1.0], [8]).grid_anchors([torch.zeros(1, 1, 2, 2)], torch.float32)


@pytest.mark.parametrize('changes', [
    dict(strides=[0, 8]), dict(ratios=[0.0]), dict(scales=[-4]), dict(scales=[])])
def test_values_that_cannot_be(changes: dict) -> None:
    name, = changes
    with pytest.raises(ValueError, match=rf'anchor_generator\.{name}='):
        AnchorGenerator(**dict(strides=[4, 8], ratios=[1.0], scales=[8]) | changes)
