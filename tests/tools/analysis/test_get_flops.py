"""Counts against the paper's."""

import importlib.util
from pathlib import Path

import pytest
from torch import nn

from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / 'configs/gcnet/mask_rcnn_r16_gcb_c3-c5_r50_fpn_1x.py'
spec = importlib.util.spec_from_file_location('get_flops', ROOT / 'tools/analysis/get_flops.py')
assert spec is not None and spec.loader is not None
get_flops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(get_flops)
LAST_OF_C4 = (False, False, (-1,), False)


def build(**backbone: object) -> nn.Module:
    cfg = load_config(CONFIG, {f'model.backbone.{key}': value for key, value in backbone.items()})
    return get_flops.build(cfg)


def context(**backbone: object) -> float:
    """Millions of parameters of the context blocks."""
    return get_flops.count_parameters(build(**backbone))['context'] / 1e6


def test_parameters_of_the_base() -> None:
    """44.401M with the class-specific box and mask layers of 2019, which had a background class."""
    counts = get_flops.count_parameters(build(gcb=None, stage_with_gcb=(False,) * 4))
    background = 4 * (1024 + 1) + (256 + 1)
    assert counts['context'] == 0
    assert (counts['all'] + background) / 1e6 == pytest.approx(44.401, abs=0.0006)


def test_parameters_of_context_blocks() -> None:
    for ratio, millions in ((1 / 4, 10.00), (1 / 8, 5.02), (1 / 16, 2.52), (1 / 32, 1.28)):
        assert context(gcb=dict(ratio=ratio)) == pytest.approx(millions, abs=0.006)
    for stage, millions in enumerate((0.136, 0.800, 1.586), start=1):
        stages = [i == stage for i in range(4)]
        assert context(stage_with_gcb=stages) == pytest.approx(millions, abs=0.0006)
    for kind, millions in (('NL', 2.10), ('SNL', 1.05)):
        gcb = dict(_delete_=True, type=kind)
        assert context(gcb=gcb, stage_with_gcb=LAST_OF_C4) == pytest.approx(millions, abs=0.006)


def test_a_data_preprocessor_beside_the_model_is_its_own() -> None:
    cfg = load_config(CONFIG)
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    assert get_flops.count_parameters(get_flops.build(cfg)) == get_flops.count_parameters(build())


@pytest.mark.parametrize('arguments, message', [
    (['--shape', '0', '160'], '--shape 0 160 --rois 1000: sides from 1'),
    (['--rois', '-1'], '--shape 1280 800 --rois -1: .* RoIs from 0')])
def test_sizes_that_are_none_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_flops.main([str(CONFIG), *arguments])


def test_multiply_adds_of_a_convolution_by_hand() -> None:
    model = build()
    fewer, more = (get_flops.count_multiply_adds(model, 64, 64, rois) for rois in (10, 11))
    # One more RoI: two fully connected layers, then 81 logits and 320 deltas.
    assert more - fewer == 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320)


# c4 of an image of 64 x 64: 1024 channels at 16 positions. The operator that pools by attention averages too.
POOLING = 2 * 1024 * 16


@pytest.mark.parametrize('gcb, expected', [
    (dict(ratio=1 / 16), POOLING + 2 * 1024 * 64),
    (dict(ratio=1 / 16, pooling_type='avg', fusion_types=('channel_add', 'channel_mul')),
     POOLING + 2 * 2 * 1024 * 64),
    (dict(type='NL', ratio=1 / 2), 4 * 1024 * 512 * 16 + 2 * 512 * 16**2),
    (dict(type='SNL'), POOLING + 1024**2),
    (dict(type='SE', ratio=1 / 16), POOLING + 2 * 1024 * 64)])
def test_multiply_adds_of_context_blocks_by_hand(gcb: dict, expected: int) -> None:
    found = [get_flops.count_multiply_adds(model, 64, 64, 1) for model in (
        build(gcb=dict(gcb, _delete_=True), stage_with_gcb=LAST_OF_C4),
        build(gcb=None, stage_with_gcb=(False,) * 4))]
    assert found[0] - found[1] == expected


def test_a_deformable_convolution_costs_its_offsets_more() -> None:
    deformable = build(dcn=dict(type='DCN'), stage_with_dcn=(False, False, False, True))
    found = [get_flops.count_multiply_adds(model, 64, 64, 1) for model in (deformable, build())]
    assert found[0] - found[1] == 3 * 512 * 18 * 9 * 4  # three blocks of c5, with 2 x 2 positions
