import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet.models.layers.conv_module import ConvModule, conv_norm
from mmdet.models.layers.deform_conv import DeformConv2d


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


@pytest.mark.parametrize('stride, groups', [(1, 1), (2, 2)])
def test_a_batch_norm_in_eval_mode_is_folded(stride: int, groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, stride, padding=1, groups=groups, bias=False).double()
    norm = nn.BatchNorm2d(6).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    found, expected = conv_norm(conv, norm, x), norm(conv(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    wanted = [x, conv.weight, norm.weight, norm.bias]
    for a, b in zip(*(torch.autograd.grad(out, wanted, direction) for out in (found, expected))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_folded_is_called() -> None:
    x = torch.randn(2, 4, 5, 7)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    for layer, norm in (
            (conv, nn.BatchNorm2d(4)), (conv, nn.GroupNorm(2, 4)),
            (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4).eval()),
            (DeformConv2d(4, 4, 1, 1, False, 1), nn.BatchNorm2d(4).eval())):
        called = []
        norm.register_forward_hook(lambda *args, called=called: called.append(1))
        torch.testing.assert_close(conv_norm(layer, norm, x), norm(layer(x)), rtol=1e-4, atol=1e-5)
        assert len(called) == 2
