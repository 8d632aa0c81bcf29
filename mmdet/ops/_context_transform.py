"""The middle of a global context block (GCNet, arXiv 1904.11492, equation 5): its transform."""
import torch
from torch import Tensor

from ._context_block import compute_dtype


def context_transform(
    context: Tensor, first_weight: Tensor, first_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    last_weight: Tensor, last_bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """A bottleneck of P channels: linear, layer norm, ReLU, linear.

    Args:
        context: `(N, C)`, N being small. All is computed in float64 if this is, else in float32.
        first_weight, first_bias: `(P, C)` and `(P,)`, any floating dtype, as all parameters. Further
            sizes of 1, which a 1x1 convolution has, do not count.
        norm_weight, norm_bias: `(P,)` of the layer norm.
        last_weight, last_bias: `(C, P)` and `(C,)`.
        eps: what the layer norm adds to the variance.

    Returns:
        `(N, C)`, float64 or float32.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer tensors.
    """
    return torch.ops.mmdet.context_transform(
        context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps)[0]


@torch.library.register_fake('mmdet::context_transform')
def _(
    context: Tensor, first_weight: Tensor, first_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    last_weight: Tensor, last_bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    (n, c), p = context.shape, first_weight.shape[0]
    sizes = (n, c), (n, p), (n, p), (n, 1), (n, 1)
    return tuple(context.new_empty(size, dtype=compute_dtype(context)) for size in sizes)


@torch.library.register_fake('mmdet::context_transform_backward')
def _(
    grad: Tensor, context: Tensor, hidden: Tensor, active: Tensor, mean: Tensor, inverse: Tensor,
    first_weight: Tensor, norm_weight: Tensor, last_weight: Tensor
) -> tuple[Tensor, ...]:
    channels, planes = context.shape[1], hidden.shape[1]
    return (
        torch.empty_like(context, dtype=hidden.dtype, memory_format=torch.contiguous_format),
        *(weight.new_empty(size) for weight, size in (
            (first_weight, first_weight.shape), (first_weight, planes), (norm_weight, norm_weight.shape),
            (norm_weight, norm_weight.shape), (last_weight, last_weight.shape), (last_weight, channels))))
