"""An optimizer's state from a checkpoint: whether it fits, and where it lies."""

from typing import Any

import torch


def is_state_of(saved: dict[str, Any], groups: list[dict[str, Any]]) -> bool:
    """Whether a saved state is of the optimizer that has ``groups``; PyTorch itself checks no shapes.

    A release of PyTorch adds settings, another optimizer has others.
    """
    given = saved.get('param_groups') or []
    same = len(given) == len(groups) and all(
        len(a['params']) == len(b['params']) and not (a.keys() - b.keys() and b.keys() - a.keys())
        for a, b in zip(given, groups))
    parameters = [parameter for group in groups for parameter in group['params']]
    return same and all(  # a number, or one an element; Adafactor has one a row and one a column
        value.dim() == 0 or value.dim() == parameters[i].dim()
        and all(size in (1, whole) for size, whole in zip(value.shape, parameters[i].shape))
        for i, state in saved.get('state', {}).items()
        for value in state.values() if isinstance(value, torch.Tensor))


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring a loaded state into the strides of the parameters, and give momentum to those without.

    A fused step reads state as it lies in memory, which is otherwise where a checkpoint of a GPU, whose
    weights are channels-last, goes on on a CPU. And it takes the momentum of all parameters or of none,
    while those that were frozen have none; SGD without dampening starts as if it had been zeros.
    """
    for group in optimizer.param_groups:
        for parameter in group['params']:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            lacks = group.get('momentum') and state.get('momentum_buffer') is None
            if group.get('fused') and lacks and parameter.requires_grad:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
