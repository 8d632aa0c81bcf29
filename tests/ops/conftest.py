from collections.abc import Callable

import pytest
from torch import Tensor

from mmdet.ops import context_fuse, context_pool


@pytest.fixture
def block() -> Callable[..., Tensor]:
    """A context block less its transform, with the residual addition and ReLU behind it."""

    def pool_and_fuse(x: Tensor, weight: Tensor, bias: Tensor, identity: Tensor) -> Tensor:
        context, x = context_pool(x, weight, bias)
        return context_fuse(x, context.sigmoid(), context.relu(), identity, relu=True)

    return pool_and_fuse
