"""An optimizer's state from a checkpoint: whether it fits, and where it lies."""

from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch
from mmengine.dist import all_reduce


def is_state_of(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a saved state is of this optimizer; PyTorch itself checks neither shapes nor what is there.

    A release of PyTorch adds settings, another optimizer has others.
    """
    given, groups = saved.get('param_groups') or [], optimizer.param_groups
    return len(given) == len(groups) and all(
        len(old['params']) == len(group['params'])
        and not (old.keys() - group.keys() and group.keys() - old.keys())
        and all(_fits(saved.get('state', {}).get(i), optimizer, group, parameter)
                for i, parameter in zip(old['params'], group['params']))
        for old, group in zip(given, groups))


def _fits(state: dict[str, Any] | None, optimizer: torch.optim.Optimizer, group: dict[str, Any],
          parameter: torch.Tensor) -> bool:
    """Whether a parameter of a group can go on without a state, or with this one."""
    if not state:
        return True
    small = parameter.new_ones([1] * parameter.dim()).requires_grad_()
    small.grad = torch.ones_like(small)
    probe: Any = object.__new__(type(optimizer))  # a copy would lack attributes of its own
    vars(probe).update(vars(optimizer), param_groups=[group | dict(params=[small])], state=defaultdict(dict))
    vars(probe).pop('step', None)  # mmengine's, which counts
    with suppress(Exception):  # of one that takes a closure, nothing is needed then
        probe.step()
    needed = set(probe.state[small])  # a later step finds what the first one leaves
    if isinstance(optimizer, torch.optim.SGD):
        needed.discard('momentum_buffer')  # but for this, which starts anew
    return needed <= state.keys() and all(
        # A number, or one an element; Adafactor has one a row and one a column.
        value.dim() == 0 or value.dim() == parameter.dim()
        and all(size in (1, whole) for size, whole in zip(value.shape, parameter.shape))
        for value in state.values() if isinstance(value, torch.Tensor))


def pending_gradients(model: torch.nn.Module, scale: float) -> dict[str, torch.Tensor]:
    """What waits for the optimizer in the middle of an accumulation, averaged over all processes.

    Without the factor ``scale`` of the losses in float16, which another training may not have.
    """
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # in all processes, also where one has no gradient
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / scale
            all_reduce(gradient, op='mean')
            if parameter.grad is not None or gradient.any():
                gradients[name] = gradient
    return gradients


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring a loaded state to where the optimizer wants it, and give momentum to parameters without.

    A fused step reads state as it lies in memory, which is otherwise where a checkpoint of a GPU, whose
    weights are channels-last, goes on on a CPU, and counts steps on the GPU. And it takes the momentum of
    all parameters or of none, while those that were frozen have none; SGD without dampening starts as if it
    had been zeros.
    """
    for group in optimizer.param_groups:
        for parameter in group['params']:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                elif key == 'step' and (group.get('fused') or group.get('capturable')):
                    state[key] = torch.as_tensor(value, dtype=torch.float32, device=parameter.device)
            lacks = group.get('momentum') and state.get('momentum_buffer') is None
            if group.get('fused') and lacks and parameter.requires_grad:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
