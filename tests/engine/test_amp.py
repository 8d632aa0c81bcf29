import logging

import pytest
import torch
from torch import nn

from mmdet.engine.amp import warn_of_slow_bfloat16
from mmdet.registry import OPTIM_WRAPPERS


def build(device: str | torch.device = 'cpu', **options):
    layer = nn.Linear(4, 2).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    return layer, OPTIM_WRAPPERS.build(dict(type='AmpOptimWrapper', optimizer=optimizer, **options))


def test_float16_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='float16 training needs a GPU; on the CPU use bfloat16'):
        build(dtype='float16')


@pytest.mark.parametrize('capability, bfloat16, gpu, warned', [
    ('AVX2', False, False, True), ('AVX512', False, False, True), ('AVX512', True, False, False),
    ('SVE256', False, False, False), ('AVX2', False, True, False)])
def test_slow_bfloat16_is_said(
    capability: str, bfloat16: bool, gpu: bool, warned: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: bfloat16)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    warn_of_slow_bfloat16(logging.getLogger('test'))
    assert ('bfloat16 takes several times as long' in caplog.text) == warned


def test_unknown_types_are_refused() -> None:
    with pytest.raises(ValueError, match="optim_wrapper.dtype='int8': choose float16 or bfloat16"):
        build(dtype='int8')


def test_bfloat16_computes_in_half_and_steps_in_float32(device: torch.device) -> None:
    layer, wrapper = build(device, dtype='bfloat16')
    x, weight = torch.randn(8, 4, device=device), layer.weight.detach().clone()
    with wrapper.optim_context(layer):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    # d(sum)/dW is the sum of x over the batch, in every row; bfloat16 has 8 bits.
    expected = weight - 0.1 * x.sum(0)
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(
        layer.weight.detach(), expected, rtol=0, atol=0.1 * 2**-6 * x.abs().sum(0).max().item()
    )
    assert not torch.equal(layer.weight, weight)


def test_a_training_in_bfloat16_goes_on_in_float16() -> None:
    _, wrapper = build('cpu', dtype='bfloat16')
    state = wrapper.state_dict()
    assert state['loss_scaler'] == {}
    wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=8.0)  # of float16, which needs a GPU
    wrapper.load_state_dict(state)
    assert wrapper.loss_scaler.get_scale() == 8.0


@pytest.mark.parametrize('loss_scale, before, after', [('dynamic', 2.0**16, 2.0**15), (8, 8, 8)])
def test_a_fixed_loss_scale_stays(
    loss_scale: str | float, before: float, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)  # float16's scaler works on the CPU as well
    layer, wrapper = build(dtype='float16', loss_scale=loss_scale)
    assert wrapper.loss_scaler.get_scale() == before
    wrapper.update_params(layer(torch.full((8, 4), float('inf'))).sum())
    assert wrapper.loss_scaler.get_scale() == after


@pytest.mark.cuda
def test_float16_scales_the_loss() -> None:
    _, wrapper = build('cuda')
    assert wrapper.cast_dtype == torch.float16
    assert wrapper.loss_scaler.get_scale() > 1
    assert wrapper.state_dict()['loss_scaler']['scale'] > 1
