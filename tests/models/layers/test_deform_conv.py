"""The deformable layer against torchvision's operator."""
import pytest
import torch
import torchvision

from mmdet.models.layers.deform_conv import DeformConv2d


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('modulated', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torchvision(device, dtype, modulated, stride):
    layer = DeformConv2d(8, 12, stride, groups=2, modulated=modulated, deform_groups=4).to(device, dtype)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    x = torch.randn(2, 8, 9, 10, device=device, dtype=dtype, requires_grad=True)
    output = layer(x)
    parameters = [x, *layer.parameters()]
    grads = torch.autograd.grad(output.square().sum(), parameters)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    offset, mask = layer.conv_offset(x).to(wide), None
    if modulated:
        offset, mask = offset[:, :72], offset[:, 72:].sigmoid()
    expected = torchvision.ops.deform_conv2d(
        x.to(wide), offset, layer.weight.to(wide), stride=stride, padding=1, mask=mask).to(dtype)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    for found, other in zip([output, *grads], [expected, *expected_grads], strict=True):
        bound = 100 * torch.finfo(wide).eps if dtype == wide else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, other, rtol=0, atol=bound * other.abs().max().item())


def test_starts_as_a_plain_convolution(device):
    layer = DeformConv2d(4, 6, stride=1, groups=2, modulated=False, deform_groups=1).to(device)
    x = torch.randn(1, 4, 5, 7, device=device)
    expected = torch.nn.functional.conv2d(x, layer.weight, padding=1, groups=2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_offset_groups_must_fit():
    with pytest.raises(ValueError, match='dcn.deform_groups=3 does not divide the 8 channels'):
        DeformConv2d(8, 8, stride=1, groups=1, modulated=False, deform_groups=3)
