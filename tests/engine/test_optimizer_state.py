from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdet.engine.optimizer_state import is_state_of, lay_out_state


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_the_own_state_of_an_optimizer_fits(kind: type[torch.optim.Optimizer]) -> None:
    """Of Adafactor that is a number a row and one a column."""
    layer = nn.Linear(3, 2)
    optimizer = kind(layer.parameters(), lr=0.1, **({'momentum': 0.9} if kind is torch.optim.SGD else {}))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert is_state_of(state, optimizer)
    state['state'] = {0: state['state'][1], 1: state['state'][0]}
    assert not is_state_of(state, optimizer)


@pytest.mark.parametrize('kind, old, new, fits', [
    (torch.optim.AdamW, {}, dict(amsgrad=True), False),
    (torch.optim.AdamW, dict(amsgrad=True), {}, True),
    (torch.optim.RMSprop, {}, dict(momentum=0.9), False),
    (torch.optim.RMSprop, {}, dict(centered=True), False),
    (torch.optim.SGD, {}, dict(momentum=0.9), True),
])
def test_a_state_without_what_a_step_needs_does_not_fit(
    kind: type[torch.optim.Optimizer], old: dict[str, Any], new: dict[str, Any], fits: bool
) -> None:
    layer = nn.Linear(3, 2)
    first, second = (kind(layer.parameters(), lr=0.1, **options) for options in (old, new))
    layer(torch.ones(1, 3)).sum().backward()
    first.step()
    state = first.state_dict()
    assert is_state_of(state, second) == fits
    second.load_state_dict(state)
    second.param_groups[0].update(new)
    if fits:
        second.step()
    else:
        with pytest.raises(KeyError):
            second.step()


def test_optimizers_with_attributes_and_steps_of_their_own() -> None:
    class Scaled(torch.optim.SGD):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.factor = 2

        def step(self, closure: Any = None) -> None:
            assert self.factor == 2
            for group in self.param_groups:
                for parameter in group['params']:
                    self.state[parameter]['mine'] = torch.ones(())

    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = Scaled(layer.parameters(), lr=0.1)
    optimizer.step()
    state = optimizer.state_dict()
    assert is_state_of(state, optimizer)
    del state['state'][0]['mine']
    state['state'][0]['other'] = torch.ones(())
    assert not is_state_of(state, optimizer) and torch.equal(layer.weight, before)
    optimizer.factor = 3  # its step fails, which says nothing of the state
    assert is_state_of(state, optimizer)


def steps(conv: nn.Conv2d, state: dict[str, Any] | None, gradients: list[Tensor]) -> torch.optim.SGD:
    """Fused steps of SGD with these gradients of the weight, from ``state`` on."""
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9, fused=True)
    if state is not None:
        optimizer.load_state_dict(state)
        lay_out_state(optimizer)
    for gradient in gradients:
        for parameter in conv.parameters():
            if parameter.requires_grad:
                parameter.grad = gradient if parameter is conv.weight else torch.ones_like(parameter)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_state_goes_on_in_the_layout_of_the_weights(layout: torch.memory_format) -> None:
    conv, gradients = nn.Conv2d(3, 4, 3), list(torch.randn(2, 4, 3, 3, 3))
    first = [parameter.detach().clone() for parameter in conv.parameters()]
    state = steps(conv, None, gradients[:1]).state_dict()
    state['state'][0]['momentum_buffer'] = state['state'][0]['momentum_buffer'].clone(memory_format=layout)
    steps(conv, state, gradients[1:])
    torch.testing.assert_close(conv.weight, first[0] - 0.1 * (1.9 * gradients[0] + gradients[1]))
    torch.testing.assert_close(conv.bias, first[1] - 0.1 * 2.9)


def test_what_was_frozen_starts_without_momentum() -> None:
    conv, gradients = nn.Conv2d(3, 4, 3), list(torch.randn(2, 4, 3, 3, 3))
    conv.bias.requires_grad_(False)
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    state = steps(conv, None, gradients[:1]).state_dict()
    assert list(state['state']) == [0]
    conv.bias.requires_grad_(True)
    steps(conv, state, gradients[1:])
    torch.testing.assert_close(conv.weight, weight - 0.1 * (1.9 * gradients[0] + gradients[1]))
    torch.testing.assert_close(conv.bias, bias - 0.1)
