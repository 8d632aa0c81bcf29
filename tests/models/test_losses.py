import pytest
import torch
import torch.nn.functional as F

from mmdet.models.losses import CrossEntropyLoss, L1Loss, SmoothL1Loss


def test_softmax_cross_entropy() -> None:
    logits, labels = torch.randn(10, 5), torch.randint(0, 5, (10,))
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels), expected)
    torch.testing.assert_close(CrossEntropyLoss(loss_weight=0.5)(logits, labels, 40), expected * 10 / 40 / 2)


def test_binary_cross_entropy_keeps_the_dtype() -> None:
    logits, target = torch.randn(10, dtype=torch.float64), torch.rand(10) < 0.5
    expected = F.binary_cross_entropy_with_logits(logits, target.double())
    loss = CrossEntropyLoss(use_sigmoid=True)(logits, target)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected)


def test_l1() -> None:
    pred, target = torch.randn(10, 4), torch.randn(10, 4)
    torch.testing.assert_close(L1Loss()(pred, target), F.l1_loss(pred, target))
    torch.testing.assert_close(L1Loss(loss_weight=2)(pred, target, 7), F.l1_loss(pred, target) * 80 / 7)


def test_smooth_l1_by_hand() -> None:
    pred = torch.tensor([0.0, 0.05, 1.0, -3.0])
    beta = 1 / 9
    expected = (0.05**2 / (2 * beta) + (1 - beta / 2) + (3 - beta / 2)) / 4
    assert SmoothL1Loss(beta=beta)(pred, torch.zeros(4)).item() == pytest.approx(expected, rel=1e-6)
    assert SmoothL1Loss(beta=beta, loss_weight=2)(pred, torch.zeros(4), 8).item() == pytest.approx(
        expected, rel=1e-6)


@pytest.mark.parametrize('avg_factor', [None, 1, 512])
@pytest.mark.parametrize('loss, shape', [
    (CrossEntropyLoss(), (0, 5)), (CrossEntropyLoss(use_sigmoid=True), (0, 28, 28)), (L1Loss(), (0, 4)),
    (SmoothL1Loss(), (0, 4))], ids=['softmax', 'sigmoid', 'l1', 'smooth l1'])
def test_nothing_costs_nothing_and_has_a_gradient(loss, shape: tuple[int, ...], avg_factor) -> None:
    weight = torch.randn(3, shape[-1], requires_grad=True)
    pred = torch.zeros(*shape[:-1], 3) @ weight
    target = torch.zeros(0, dtype=torch.int64) if shape == (0, 5) else torch.zeros(shape)
    value = loss(pred, target, avg_factor)
    assert value.shape == () and value.item() == 0
    value.backward()
    assert weight.grad is not None and (weight.grad == 0).all()
