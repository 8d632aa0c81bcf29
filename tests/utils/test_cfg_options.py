import argparse
from typing import Any

import pytest

from mmdet.utils.cfg_options import CfgOptions


def parse(*options: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions)
    return parser.parse_args(['--cfg-options', *options]).cfg_options


@pytest.mark.parametrize('text', [
    "[dict(type='EMAHook',momentum=0.1)]", "[{'type': 'EMAHook', 'momentum': 0.1}]",
    "[dict(type='EMAHook', momentum=1e-1)]"])
def test_dicts(text: str) -> None:
    assert parse(f'custom_hooks={text}') == dict(custom_hooks=[dict(type='EMAHook', momentum=0.1)])


def test_strings_in_lists_keep_their_spaces() -> None:
    options = parse("a=('hair drier','x, y')", 'b=[c,2]', 'd=(1)', 'e=1,2', 'f=/d/run 2 (old)/a[1]')
    assert options == dict(a=('hair drier', 'x, y'), b=['c', 2], d=(1,), e=[1, 2], f='/d/run 2 (old)/a[1]')


def test_what_is_quoted_is_a_string() -> None:
    options = parse('a="/d/x,y.pth"', "b='2024'", 'c="None"', "d='hair drier'", 'e="(1, 2)"', 'f="it\'s"',
                    r"g='C:\new'")
    assert options == dict(
        a='/d/x,y.pth', b='2024', c='None', d='hair drier', e=(1, 2), f="it's", g=r'C:\new')


@pytest.mark.parametrize('text', ['[dict(type=EMAHook)]', '[dict(a)]', '[dict(**{})]', '{1', 'dict(a=f())'])
def test_malformed_dicts(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f'custom_hooks={text}')
    assert 'custom_hooks=' in capsys.readouterr().err


@pytest.mark.parametrize('word', ['a', '=1', 'a=(1', 'a=[1)'])
def test_malformed_option(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(word)
    assert f'{word!r} is not of the form key.subkey=value' in capsys.readouterr().err
