"""Deformable convolution against torchvision's, and against a plain convolution."""
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from mmdet.ops import deform_conv2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def make_arguments(
    channels: int = 12, out: int = 8, groups: int = 2, parts: int = 3, size: tuple[int, int] = (9, 11),
    kernel: tuple[int, int] = (3, 3), stride: int = 1, padding: int = 1, masked: bool = True,
) -> list[Tensor | None]:
    """x, offset, mask, weight. Offsets reach far outside the map; float32 holds all positions exactly."""
    out_size = [(side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel)]
    taps = parts * math.prod(kernel)
    offset = (64 * 4 * torch.randn(2, 2 * taps, *out_size)).round() / 64
    return [torch.randn(2, channels, *size), offset,
            torch.rand(2, taps, *out_size) if masked else None, torch.randn(out, channels // groups, *kernel)]


def torchvision_conv(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: int, padding: int
) -> Tensor:
    return torchvision.ops.deform_conv2d(x, offset, weight, stride=stride, padding=padding, mask=mask)


def results(op, arguments: list[Tensor | None], stride: int, padding: int) -> list[Tensor]:
    """The output and the gradients of all arguments."""
    leaves = [None if part is None else part.detach().requires_grad_() for part in arguments]
    output = op(*leaves, stride, padding)
    given = [leaf for leaf in leaves if leaf is not None]
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    return [output.detach(), *torch.autograd.grad(output, given, weight)]


def assert_equals_torchvision(
    arguments: list[Tensor | None], stride: int, padding: int, dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    own = [None if part is None else part.to(dtype) for part in arguments]
    own[0] = own[0].to(memory_format=layout)
    exact = [None if part is None else part.double() for part in arguments]
    found = results(deform_conv2d, own, stride, padding)
    for part, expected in zip(found, results(torchvision_conv, exact, stride, padding), strict=True):
        bound = 200 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(part.double(), expected, rtol=0, atol=bound)
        assert part.dtype == dtype
    written = torch.contiguous_format if own[0].is_contiguous() else layout
    assert all(found[i].is_contiguous(memory_format=written) for i in (0, 1))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('options', [
    dict(), dict(masked=False), dict(groups=1, parts=1), dict(groups=12, out=12, parts=1),
    dict(groups=3, out=9, parts=2), dict(groups=2, parts=12), dict(stride=2), dict(padding=0, stride=3),
    dict(channels=64, groups=2, parts=1), dict(channels=1, groups=1, parts=1), dict(kernel=(2, 3)),
    dict(kernel=(1, 1), padding=0), dict(size=(1, 1)), dict(size=(3, 1))], ids=str)
def test_equals_torchvision(dtype, layout, options):
    arguments = make_arguments(**options)
    assert_equals_torchvision(
        arguments, options.get('stride', 1), options.get('padding', 1), dtype, layout)


def test_more_positions_than_a_strip_has():
    arguments = make_arguments(channels=64, out=4, groups=2, parts=1, size=(120, 130), masked=False)
    assert_equals_torchvision(arguments, 1, 1, torch.float32)


def test_on_the_grid_and_at_the_border():
    """Whole offsets, where the derivative is that of the cells below and to the right."""
    x, offset, mask, weight = make_arguments(parts=1, size=(4, 5))
    assert_equals_torchvision([x, offset.round(), mask, weight], 1, 1, torch.float64)


def test_without_offsets_a_plain_convolution():
    x, offset, _, weight = make_arguments(parts=1)
    found = deform_conv2d(x, torch.zeros_like(offset), None, weight, padding=1)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1, groups=2), rtol=1e-5, atol=1e-5)


def test_cells_that_are_not_touched():
    """Samples outside the map are zeros, whatever stands inside."""
    x = torch.full((1, 2, 4, 4), float('inf'))
    weight = torch.ones(3, 2, 1, 1)
    for offset in (-50.0, 50.0, 1e30):
        found = deform_conv2d(x, torch.full((1, 2, 4, 4), offset), None, weight)
        assert torch.equal(found, torch.zeros(1, 3, 4, 4))
    empty = deform_conv2d(x[:0], torch.zeros(0, 2, 4, 4), None, weight)
    assert empty.shape == (0, 3, 4, 4)


def test_strides():
    """Views give the same as copies, to the last bit, and so does any number of threads."""
    arguments = make_arguments(channels=32, groups=4, parts=2, size=(9, 12))
    expected = results(deform_conv2d, arguments, 1, 1)
    views = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in arguments]
    torch.set_num_threads(1)
    for found in (results(deform_conv2d, arguments, 1, 1), results(deform_conv2d, views, 1, 1)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradcheck(masked, layout):
    arguments = make_arguments(4, 2, 2, 2, size=(3, 4), kernel=(2, 2), padding=0, masked=masked)
    arguments[0] = arguments[0].to(memory_format=layout)
    arguments[1] += 1 / 128  # away from whole offsets, where the derivative jumps
    leaves = [None if part is None else part.double().requires_grad_() for part in arguments]
    torch.autograd.gradcheck(deform_conv2d, leaves)


def test_no_gradient_of_the_gradient():
    arguments = make_arguments()
    x = arguments[0].requires_grad_()
    [grad] = torch.autograd.grad(deform_conv2d(*arguments, padding=1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='derivative for mmdet::deform_conv2d_backward is not'):
        grad.sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_opcheck(dtype, masked, layout):
    x, *others = (None if part is None else part.to(dtype) for part in make_arguments(masked=masked))
    x = x.to(memory_format=layout)
    leaves = [None if part is None else part.clone().requires_grad_() for part in (x, *others)]
    torch.library.opcheck(torch.ops.mmdet.deform_conv2d.default, (*leaves, 1, 1))
    grad = torch.randn(2, 8, 9, 11, dtype=dtype)
    torch.library.opcheck(torch.ops.mmdet.deform_conv2d_backward.default, (grad, x, *others, 1, 1))


def test_autocast_casts_nothing():
    arguments = make_arguments()
    expected = deform_conv2d(*arguments, padding=1)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(deform_conv2d(*arguments, padding=1), expected)


@pytest.mark.parametrize('index, change, message', [
    (0, lambda x: x[0], r'x must be \(N, C, H, W\), got \[12, 9, 11\]'),
    (3, lambda w: w[0], r'weight must be \(out, C / groups, kh, kw\)'),
    (3, lambda w: w[:, :5], r'\[8, 5, 3, 3\] does not divide 12 channels into groups'),
    (3, lambda w: w[:7], r'\[7, 6, 3, 3\] does not divide 12 channels into groups'),
    (1, lambda o: o[:, :17], r'offset must be \(2, 18 times a divisor of 12, 9, 11\), got \[2, 17, 9, 11\]'),
    (1, lambda o: o[..., 1:], r'offset must be .* got \[2, 54, 9, 10\]'),
    (2, lambda m: m[:, 1:], r'mask must be \(2, 27, 9, 11\), got \[2, 26, 9, 11\]'),
    (0, lambda x: x[:, :, :0], r'a map of 0 x 11 is smaller than a kernel of 3 x 3')])
def test_wrong_shapes(index, change, message):
    arguments = make_arguments()
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        deform_conv2d(*arguments, padding=1)


def test_wrong_options():
    with pytest.raises(ValueError, match='stride must be positive'):
        deform_conv2d(*make_arguments(), stride=0, padding=1)
    x, *others = make_arguments()
    with pytest.raises(TypeError, match='x must be float32 or float64, got Half'):
        deform_conv2d(x.half(), *others, padding=1)
    with pytest.raises(TypeError, match='all must have the dtype of x, Double, got Float'):
        deform_conv2d(x.double(), *others, padding=1)
