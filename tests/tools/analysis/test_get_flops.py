"""Counts against the paper's."""

import importlib.util
from pathlib import Path

import pytest

from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / 'configs/gcnet/mask_rcnn_r16_gcb_c3-c5_r50_fpn_1x.py'
spec = importlib.util.spec_from_file_location('get_flops', ROOT / 'tools/analysis/get_flops.py')
assert spec is not None and spec.loader is not None
get_flops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(get_flops)


def context(**backbone: object) -> float:
    """Millions of parameters of the context blocks."""
    cfg = load_config(CONFIG, {f'model.backbone.{key}': value for key, value in backbone.items()})
    return get_flops.count_parameters(get_flops.build(cfg))['context'] / 1e6


def test_parameters_of_context_blocks() -> None:
    for ratio, millions in ((1 / 4, 10.00), (1 / 8, 5.02), (1 / 16, 2.52), (1 / 32, 1.28)):
        assert context(gcb=dict(ratio=ratio)) == pytest.approx(millions, abs=0.006)
    for stage, millions in enumerate((0.136, 0.800, 1.586), start=1):
        stages = [i == stage for i in range(4)]
        assert context(stage_with_gcb=stages) == pytest.approx(millions, abs=0.0006)
    last_of_c4 = (False, False, (-1,), False)
    for kind, millions in (('NL', 2.10), ('SNL', 1.05)):
        gcb = dict(_delete_=True, type=kind)
        assert context(gcb=gcb, stage_with_gcb=last_of_c4) == pytest.approx(millions, abs=0.006)


def test_multiply_adds_of_a_convolution_by_hand() -> None:
    cfg = load_config(CONFIG)
    model = get_flops.build(cfg)
    fewer, more = (get_flops.count_multiply_adds(model, 64, 64, rois) for rois in (10, 11))
    # One more RoI: two fully connected layers, then 81 logits and 320 deltas.
    assert more - fewer == 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320)
