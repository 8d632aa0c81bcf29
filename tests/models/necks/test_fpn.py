import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mmdet.models.necks.fpn import FPN


def test_levels_are_torchvisions() -> None:
    channels = [4, 8, 16, 32]
    neck = FPN(channels, 6, num_outs=5)
    reference = FeaturePyramidNetwork(channels, 6, LastLevelMaxPool())
    state = {}
    for i in range(4):
        for theirs, ours in ((f'inner_blocks.{i}.0', neck.lateral_convs[i].conv),
                             (f'layer_blocks.{i}.0', neck.fpn_convs[i].conv)):
            state[f'{theirs}.weight'], state[f'{theirs}.bias'] = ours.weight, torch.randn(6)
            ours.bias.data = state[f'{theirs}.bias']
    reference.load_state_dict(state)
    # Odd sizes, where the upsampled level has to fit the finer one.
    x = [torch.randn(2, c, h, w) for c, h, w in zip(channels, (23, 12, 6, 3), (31, 16, 8, 4))]
    expected = list(reference({str(i): level for i, level in enumerate(x)}).values())
    for found, level in zip(neck(x), expected, strict=True):
        torch.testing.assert_close(found, level)


def test_extra_levels_are_every_other_pixel() -> None:
    outputs = FPN([4], 6, num_outs=3)([torch.randn(1, 4, 7, 9)])
    assert torch.equal(outputs[1], outputs[0][:, :, ::2, ::2])
    assert torch.equal(outputs[2], outputs[0][:, :, ::4, ::4])


def test_norm_without_activation() -> None:
    neck = FPN([4, 8], 6, num_outs=2, norm_cfg=dict(type='BN')).train()
    x = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    out = neck(x)[1]
    lateral = F.batch_norm(F.conv2d(x[1], neck.lateral_convs[1].conv.weight), None, None, training=True)
    expected = F.batch_norm(
        F.conv2d(lateral, neck.fpn_convs[1].conv.weight, padding=1), None, None, training=True)
    torch.testing.assert_close(out, expected)
    assert out.min() < 0


def test_initial_weights() -> None:
    neck = FPN([256], 256, num_outs=1)
    bound = (6 / (256 * 9 + 256 * 9)) ** 0.5
    weight = neck.fpn_convs[0].conv.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert (neck.fpn_convs[0].conv.bias == 0).all()


def test_too_few_outputs() -> None:
    with pytest.raises(ValueError, match='neck.num_outs=1 is less than the levels of neck.in_channels='):
        FPN([4, 8], 6, num_outs=1)


@pytest.mark.parametrize('given', [[4, 16], [4], [4, 8, 8]])
def test_another_backbones_levels(given: list[int]) -> None:
    with pytest.raises(ValueError) as error:
        FPN([4, 8], 6, num_outs=2)([torch.randn(1, c, 4, 4) for c in given])
    assert str(error.value) == f'neck.in_channels=[4, 8]: the backbone gives {given}'
