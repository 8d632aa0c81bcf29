import runpy
from pathlib import Path

import pytest

from mmdet.utils.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = 'configs/gcnet/mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x.py'


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr('sys.argv', ['print_config.py', *words])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path('tools/print_config.py', run_name='__main__')
    return int(exit.value.code or 0)


def test_output_is_a_config_that_loads_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = {'model.backbone.depth': 101, 'model.backbone.pretrained': None}
    words = [f'{key}={value}' for key, value in options.items()]
    assert run(monkeypatch, CONFIG, '--cfg-options', *words) == 0
    (tmp_path / 'printed.py').write_text(capsys.readouterr().out)
    printed = load_config(tmp_path / 'printed.py')
    assert printed.to_dict() == load_config(CONFIG, options).to_dict()
    assert (printed.model.backbone.depth, printed.model.backbone.gcb.ratio) == (101, 0.25)


@pytest.mark.parametrize('words, expected', [
    ([CONFIG, '--cfg-options', 'model.backbone.dpeth=18'],
     f"error: {CONFIG}: model.backbone.dpeth: unknown argument of ResNet; did you mean 'depth'?\n"),
    ([CONFIG + 'x'], f'error: {CONFIG}x: no such config file; did you mean {CONFIG}?\n'),
])
def test_an_error_is_one_line(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 1
    assert capsys.readouterr() == ('', expected)
