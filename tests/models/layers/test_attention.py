import pytest
import torch
import torch.nn.functional as F

from mmdet.models.layers.attention import NonLocal, SimplifiedNonLocal, SqueezeExcitation


def parameters(block: torch.nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def randomise(block: torch.nn.Module) -> torch.nn.Module:
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return block.double()


def test_non_local_position_by_position() -> None:
    block, x = randomise(NonLocal(6, 1 / 2)), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    flat = x.flatten(2).transpose(1, 2)
    theta, phi, g = (F.linear(flat, conv.weight[:, :, 0, 0], conv.bias)
                     for conv in (block.theta, block.phi, block.g))
    expected = flat.clone()
    for n in range(2):
        for i in range(12):
            weights = torch.stack([theta[n, i] @ phi[n, j] for j in range(12)]).softmax(0)
            context = sum(w * v for w, v in zip(weights, g[n]))
            expected[n, i] += F.linear(context, block.conv_out.weight[:, :, 0, 0], block.conv_out.bias)
    torch.testing.assert_close(block(x).flatten(2).transpose(1, 2), expected)


def test_simplified_non_local() -> None:
    block, x = randomise(SimplifiedNonLocal(6)), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    weights = block.conv_mask(x).flatten(2).softmax(2)
    context = (x.flatten(2) * weights).sum(2)
    added = F.linear(context, block.conv_value.weight[:, :, 0, 0], block.conv_value.bias)
    torch.testing.assert_close(block(x), x + added[:, :, None, None])


def test_squeeze_excitation() -> None:
    block, x = randomise(SqueezeExcitation(6, 1 / 2)), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    gate = torch.sigmoid(block.fc2(block.fc1(x.flatten(2).mean(2)).clamp(min=0)))
    torch.testing.assert_close(block(x), x * gate[:, :, None, None])


@pytest.mark.parametrize('block', [NonLocal(6, 1 / 2), SimplifiedNonLocal(6), SqueezeExcitation(6, 1 / 2)])
def test_the_residual_addition_and_relu_can_be_had_inside(block: torch.nn.Module) -> None:
    block, (x, identity) = randomise(block), torch.randn(2, 2, 6, 3, 4, dtype=torch.float64)
    inputs = [x.requires_grad_(), identity.requires_grad_(), *block.parameters()]
    found, expected = block(x, identity, relu=True), (block(x) + identity).relu()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), inputs, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True))


def test_new_blocks_change_nothing() -> None:
    x = torch.randn(2, 8, 5, 3)
    for block in (NonLocal(8, 1 / 2), SimplifiedNonLocal(8)):
        assert torch.equal(block(x), x)


def test_parameters_of_the_paper() -> None:
    """Of one block in c4: 2.10 M and 1.05 M (table 4a)."""
    assert parameters(NonLocal(1024, 1 / 2)) == pytest.approx(2.10e6, rel=2e-3)
    assert parameters(SimplifiedNonLocal(1024)) == pytest.approx(1.05e6, rel=2e-3)
