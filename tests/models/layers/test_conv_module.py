import pytest
import torch
import torch.nn.functional as F

from mmdet.models.layers.conv_module import ConvModule


@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_without_norm(kernel_size: int, relu: bool) -> None:
    module = ConvModule(4, 6, kernel_size, relu=relu)
    assert [name for name, _ in module.named_parameters()] == ['conv.weight', 'conv.bias']
    x = torch.randn(2, 4, 5, 7)
    expected = F.conv2d(x, module.conv.weight, module.conv.bias, padding=kernel_size // 2)
    torch.testing.assert_close(module(x), expected.relu() if relu else expected)


def test_norm_takes_the_place_of_the_bias() -> None:
    module = ConvModule(4, 6, 3, dict(type='BN'), relu=True)
    assert [name for name, _ in module.named_parameters()] == ['conv.weight', 'bn.weight', 'bn.bias']
    x = torch.randn(2, 4, 5, 7)
    out = F.conv2d(x, module.conv.weight, padding=1)
    variance = out.var((0, 2, 3), correction=0, keepdim=True)
    expected = (out - out.mean((0, 2, 3), True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(module(x), expected.relu(), rtol=1e-4, atol=1e-5)


def test_half_of_a_relus_variance_is_made_good() -> None:
    weight = ConvModule(64, 128, 3).conv.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
