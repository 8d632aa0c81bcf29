"""The two ends of a global context block (GCNet, arXiv 1904.11492, equation 5): pooling and fusion."""
import torch
from torch import Tensor

from ._roi_align import layout_of


def context_pool(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention pooling: a 1x1 convolution to one channel, softmax over all positions, weighted mean of x.

    Args:
        x: `(N, C, H, W)`, any strides. Half precision is accumulated in float32.
        weight: `(C,)` of the convolution, or `(1, C, 1, 1)` as it has it, any floating dtype; None weighs all
            positions alike.
        bias: `(1,)`, None for 0. Its gradient is zero, since softmax does not change with it.

    Returns:
        `(N, C)`, float64 if `x` is, else float32, zeros where H * W is 0; and `x`. What comes after should
        read this `x`: its gradient is then added in the pass that writes the pooling's, not in its own.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer tensors.
    """
    weight = x.new_zeros(x.shape[1:2]) if weight is None else weight
    bias = weight.new_zeros(1) if bias is None else bias
    return torch.ops.mmdet.context_pool_and_map(x, weight, bias)


def context_fuse(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, identity: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`x * scale + shift + identity`, one scale and shift a channel of an image; then, if asked, ReLU.

    Args:
        x: `(N, C, H, W)`, any strides.
        scale: `(N, C)`, any floating dtype, or None for 1.
        shift: `(N, C)`, any floating dtype, or None for 0.
        identity: `(N, C, H, W)`, any floating dtype, or None for 0.
        relu: whether negative values become 0.

    Returns:
        A new tensor like `x`, in its dtype.

    Raises:
        ValueError: on a wrong shape or mixed devices. TypeError: on integer tensors.
    """
    return torch.ops.mmdet.context_fuse(x, scale, shift, identity, relu)


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which the kernels compute what they get."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


@torch.library.register_fake('mmdet::context_pool')
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    return x.new_empty(n, c, dtype=compute_dtype(x)), x.new_empty(n, h * w, dtype=compute_dtype(x))


@torch.library.register_fake('mmdet::context_pool_backward')
def _(
    grad: Tensor, grad_map: Tensor | None, x: Tensor, weight: Tensor, context: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty_like(x), weight.new_empty(weight.shape)


@torch.library.register_fake('mmdet::context_fuse')
def _(x: Tensor, scale: Tensor | None, shift: Tensor | None, identity: Tensor | None, relu: bool) -> Tensor:
    return _empty_like(x)


@torch.library.register_fake('mmdet::context_fuse_backward')
def _(
    grad: Tensor, x: Tensor | None, scale: Tensor | None, output: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c = grad.shape[:2]
    dtype = compute_dtype(grad)
    like = next(map for map in (x, output, grad) if map is not None)
    return (
        _empty_like(like) if x is not None else grad.new_empty(0),
        _empty_like(like) if output is not None else grad.new_empty(0),
        grad.new_empty(0 if x is None else n, c, dtype=dtype),
        grad.new_empty(n, c, dtype=dtype))
