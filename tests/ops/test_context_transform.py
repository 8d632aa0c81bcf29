"""The context block's transform against eager PyTorch in float64."""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet.ops import context_transform

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def eager(
    context: Tensor, first_weight: Tensor, first_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    last_weight: Tensor, last_bias: Tensor, eps: float = 1e-5
) -> Tensor:
    hidden = F.linear(context, first_weight, first_bias)
    hidden = F.layer_norm(hidden, hidden.shape[1:], norm_weight, norm_bias, eps).relu()
    return F.linear(hidden, last_weight, last_bias)


def arguments(n: int, channels: int, planes: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    sizes = (
        (n, channels), (planes, channels), (planes,), (planes,), (planes,), (channels, planes), (channels,))
    return [torch.randn(size).to(device, dtype) for size in sizes]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'n, channels, planes', [(1, 64, 16), (2, 512, 128), (3, 33, 7), (5, 130, 67), (2, 9, 1), (40, 20, 5)])
def test_equals_eager(device, dtype, n, channels, planes):
    args = arguments(n, channels, planes, device, dtype)
    ours = [arg.clone().requires_grad_() for arg in args]
    theirs = [arg.cpu().double().requires_grad_() for arg in args]
    output, expected = context_transform(*ours, 1e-3), eager(*theirs, 1e-3)
    assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grad = torch.randn(n, channels)
    output.backward(grad.to(output))
    expected.backward(grad.double())
    # What is computed is float32 at least; only gradients are rounded to the dtype of what they belong to.
    exact, rounded = (torch.finfo(kind).eps for kind in (output.dtype, dtype))
    pairs = [(output, expected, exact)] + [(a.grad, b.grad, rounded) for a, b in zip(ours, theirs)]
    for part, reference, eps in pairs:
        bound = (50 * exact + eps) * reference.abs().max().item()
        torch.testing.assert_close(part.cpu().double(), reference, rtol=eps, atol=bound)


def test_a_value_that_relu_cuts_has_no_gradient(device):
    args = arguments(2, 6, 4, device, torch.float32)
    args[3].zero_()
    args[4].copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    args = [arg.requires_grad_() for arg in args]
    context_transform(*args).sum().backward()
    assert args[4].grad[:2].tolist() == [0, 0] and args[4].grad[2:].all()
    assert args[5].grad[:, :2].count_nonzero() == 0 and args[5].grad[:, 2:].all()


def test_not_a_number_stays_in_its_image(device):
    args = arguments(2, 6, 4, device, torch.float32)
    args[0][1, 2] = float('nan')
    assert context_transform(*args).isnan().tolist() == [[False] * 6, [True] * 6]


def test_strides(device):
    args = arguments(6, 40, 20, device, torch.float64)
    strided = [arg.repeat_interleave(2, -1)[..., ::2] for arg in args]
    strided[1] = args[1].t().contiguous().t()
    assert not any(arg.is_contiguous() for arg in strided)
    torch.testing.assert_close(context_transform(*strided), context_transform(*args))


def test_autocast_rounds_nothing(device):
    args = arguments(2, 64, 16, device, torch.float32)
    expected = context_transform(*args)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(context_transform(*args), expected)
        half = [args[0].bfloat16(), *(arg.requires_grad_() for arg in args[1:])]
        context_transform(*half).sum().backward()
    assert all(arg.grad.dtype == torch.float32 for arg in args[1:])


def test_empty(device):
    args = [arg.requires_grad_() for arg in arguments(0, 6, 4, device, torch.float32)]
    output = context_transform(*args)
    assert output.shape == (0, 6)
    output.sum().backward()
    assert args[0].grad.shape == (0, 6) and all(arg.grad.count_nonzero() == 0 for arg in args[1:])


def test_errors(device):
    args = arguments(2, 6, 4, device, torch.float32)
    for index, wrong, error, message in [
            (0, args[0][0], ValueError, r'context must be \(N, C\), got \[6\]'),
            (0, args[0].int(), TypeError, 'context must be floating point, got Int'),
            (1, args[1][:0], ValueError, r'first_weight must have a row at least, got \[0, 6\]'),
            (1, args[1][:, 1:], ValueError, r'first_weight must be \[4, 6\], got \[4, 5\]'),
            (2, args[2][1:], ValueError, r'first_bias must be \[4\], got \[3\]'),
            (4, args[4].int(), TypeError, 'norm_bias must be floating point, got Int'),
            (5, args[5].t(), ValueError, r'last_weight must be \[6, 4\], got \[4, 6\]'),
            (6, args[2], ValueError, r'last_bias must be \[6\], got \[4\]')]:
        with pytest.raises(error, match=message) as caught:
            context_transform(*args[:index], wrong, *args[index + 1:])
        assert '\n' not in str(caught.value)


def test_parameters_of_convolutions(device):
    args = arguments(2, 6, 4, device, torch.float32)
    convolutional = [arg[..., None, None] if index in (1, 3, 4, 5) else arg for index, arg in enumerate(args)]
    ours, theirs = ([arg.clone().requires_grad_() for arg in part] for part in (convolutional, args))
    for part in (ours, theirs):
        context_transform(*part).square().sum().backward()
    for a, b in zip(ours, theirs):
        assert a.grad.shape == a.shape and torch.equal(a.grad.flatten(), b.grad.flatten())


def test_gradcheck(device):
    args = [arg.requires_grad_() for arg in arguments(2, 6, 4, device, torch.float64)]
    torch.autograd.gradcheck(context_transform, args)


@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(device, dtype, requires_grad):
    args = [arg.requires_grad_(requires_grad) for arg in arguments(2, 6, 4, device, dtype)]
    torch.library.opcheck(torch.ops.mmdet.context_transform.default, (*args, 1e-5))
    args = [arg.detach() for arg in args]
    grad, *kept = torch.ops.mmdet.context_transform(*args, 1e-5)
    context, first, _, weight, _, last, _ = args
    torch.library.opcheck(
        torch.ops.mmdet.context_transform_backward.default, (grad, context, *kept, first, weight, last))


def test_compile(device):
    args = arguments(2, 6, 4, device, torch.float32)
    ours, theirs = ([arg.clone().requires_grad_() for arg in args] for _ in range(2))
    output = torch.compile(context_transform, fullgraph=True, backend='aot_eager')(*ours)
    expected = context_transform(*theirs)
    torch.testing.assert_close(output, expected)
    for result in (output, expected):
        result.square().sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)
