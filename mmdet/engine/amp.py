"""Mixed precision on the GPU and on the CPU."""

from logging import Logger
from typing import Any

import mmengine.optim
import torch
from mmengine.optim import OptimWrapper

from mmdet.registry import OPTIM_WRAPPERS


def warn_of_slow_bfloat16(logger: Logger) -> None:
    """Say so where bfloat16, which it is on a CPU, takes longer than float32 would."""
    x86 = torch.backends.cpu.get_cpu_capability() in ('DEFAULT', 'AVX2', 'AVX512')
    if x86 and not torch.cpu._is_avx512_bf16_supported() and not torch.cuda.is_available():
        logger.warning('bfloat16 takes several times as long as float32 on this CPU, which has no '
                       'instructions for it (AVX512_BF16); leave --amp out')


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(mmengine.optim.AmpOptimWrapper):
    """Forward passes in half precision, weights in float32; mmengine's works on GPUs only.

    Args:
        dtype: 'float16' (GPU only; gradients are scaled so that small ones survive), 'bfloat16', or
            None for float16 on a GPU and bfloat16 on the CPU.
        loss_scale: 'dynamic' or a fixed factor; float16 only.
    """

    def __init__(self, dtype: str | None = None, loss_scale: str | float = 'dynamic', **kwargs: Any) -> None:
        OptimWrapper.__init__(self, **kwargs)  # mmengine's own constructor refuses the CPU
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        dtype = dtype or ('float16' if device == 'cuda' else 'bfloat16')
        if dtype not in ('float16', 'bfloat16'):
            raise ValueError(f'optim_wrapper.dtype={dtype!r}: choose float16 or bfloat16')
        if dtype == 'float16' and device == 'cpu':
            raise ValueError('float16 training needs a GPU; on the CPU use bfloat16 (--amp bf16)')
        self.cast_dtype = getattr(torch, dtype)
        scale: dict[str, Any] = {} if loss_scale == 'dynamic' else dict(init_scale=float(loss_scale))
        self.loss_scaler = torch.amp.GradScaler(device, enabled=dtype == 'float16', **scale)
        self._scale_update_param = None if loss_scale == 'dynamic' else float(loss_scale)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As mmengine's, but of a training without a scaler: this one's stays as it starts."""
        if not state_dict.get('loss_scaler'):
            state_dict.pop('loss_scaler', None)
        super().load_state_dict(state_dict)
