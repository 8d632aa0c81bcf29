"""Which gradients the global context ops give, and which not; their values are tested op by op."""
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdet.ops import context_fuse, context_pool, context_transform

SIZES = [(2, 6), (4, 6), (4,), (4,), (4,), (6, 4), (6,)]  # of the transform's inputs


def block_arguments(device: torch.device) -> list[Tensor]:
    return [torch.randn(size, device=device) for size in ((2, 3, 4, 5), (3,), (1,), (2, 3, 4, 5))]


def assert_each_alone(op, given: list[Tensor | None]) -> None:
    """That an input has the same gradient whichever others have one."""
    there = [index for index, part in enumerate(given) if part is not None]
    args = [None if part is None else part.clone().requires_grad_() for part in given]
    expected = torch.autograd.grad(op(*args).square().sum(), [args[index] for index in there])
    for index, whole in zip(there, expected):
        # Asked for alone, and the only one that can be asked for.
        [asked] = torch.autograd.grad(op(*args).square().sum(), args[index])
        alone = list(given)
        alone[index] = given[index].clone().requires_grad_()
        [only] = torch.autograd.grad(op(*alone).square().sum(), alone[index])
        assert torch.equal(asked, whole) and torch.equal(only, whole)


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('added', [False, True])
@pytest.mark.parametrize('scaled, shifted', [(True, True), (True, False), (False, True), (False, False)])
def test_one_input_of_the_fusion(device, scaled, shifted, added, relu):
    """Inputs that there are not move those behind them."""
    x, identity = torch.randn(2, 2, 3, 4, 5, device=device)
    scale, shift = torch.randn(2, 2, 3, device=device)
    given = [x, scale if scaled else None, shift if shifted else None, identity if added else None]
    assert_each_alone(lambda *args: context_fuse(*args, relu=relu), given)


def test_one_input_of_pooling_and_transform(device, block):
    assert_each_alone(block, block_arguments(device))
    assert_each_alone(context_transform, [torch.randn(size, device=device) for size in SIZES])


class Cut(torch.autograd.Function):
    """Has no gradient for what it gets."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


def test_no_gradient_comes_in(device, block):
    for op, given in (
            (block, block_arguments(device)),
            (lambda *args: context_pool(*args)[0], block_arguments(device)[:3]),
            (context_transform, [torch.randn(size, device=device) for size in SIZES])):
        args = [arg.requires_grad_() for arg in given]
        grads = torch.autograd.grad(Cut.apply(op(*args)).sum(), args, allow_unused=True)
        assert grads == (None,) * len(args)


def test_no_gradient_of_the_gradient(device):
    x, weight, bias, _ = block_arguments(device)
    x.requires_grad_()
    transform = [torch.randn(size, device=device) for size in SIZES]
    for name, output in (
            ('pool', context_pool(x, weight, bias)[0]),
            ('fuse', context_fuse(x, x.mean((2, 3)), None)),
            ('transform', context_transform(x[:, :, :2, 0].flatten(1), *transform[1:]))):
        [grad] = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=f'derivative for mmdet::context_{name}_backward is not'):
            grad.sum().backward()


def test_no_derivative_in_forward_mode(device):
    x, weight, bias, _ = block_arguments(device)
    transform = [torch.randn(size, device=device) for size in SIZES]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for function in (
                lambda: context_pool(dual, weight, bias), lambda: context_fuse(x, None, dual.mean((2, 3))),
                lambda: context_transform(dual[:, :, :2, 0].flatten(1), *transform[1:])):
            with pytest.raises(RuntimeError, match='jvp is not implemented'):
                function()


@pytest.mark.parametrize('enabled', [False, True])
def test_nothing_is_kept_without_need(device, block, enabled):
    kept = []
    args = [arg.requires_grad_(not enabled) for arg in block_arguments(device)]
    transform = [torch.randn(size, device=device, requires_grad=not enabled) for size in SIZES]
    with (torch.set_grad_enabled(enabled),
          torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor)):
        outputs = block(*args), context_transform(*transform)
    assert not kept and not any(output.requires_grad for output in outputs)


def test_weight_of_a_convolution(device):
    conv, x = nn.Conv2d(3, 1, 1).to(device), torch.randn(2, 3, 4, 5, device=device)
    weight = conv.weight.detach().flatten().requires_grad_()
    for part in (conv.weight, weight):
        context_pool(x, part, conv.bias)[0].square().sum().backward()
    assert conv.weight.grad.shape == (1, 3, 1, 1) and torch.equal(conv.weight.grad.flatten(), weight.grad)


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpoint(device, block, reentrant):
    args = [arg.requires_grad_() for arg in block_arguments(device)]
    expected = torch.autograd.grad(block(*args).square().sum(), args)
    checkpoint(block, *args, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(arg.grad, grad) for arg, grad in zip(args, expected))
