"""The tables in the README files are those that the configs' docstrings give."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location('results_table', ROOT / 'tools/analysis/results_table.py')
assert spec is not None and spec.loader is not None
results_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results_table)


def test_readme_files_hold_the_tables() -> None:
    for (path, name), table in results_table.tables().items():
        text = path.read_text()
        assert results_table.with_table(text, name, table) == text, f'{path}: run results_table.py --write'


def test_rows_are_the_thirty_published_ones() -> None:
    rows = results_table.read_rows()
    assert len(rows) == 30
    best = {(r.backbone, r.model, r.norm, r.heads, r.schedule): (r.box_ap, r.mask_ap)
            for r in rows if r.context == 'GC(c3-c5, r4)'}
    assert best['R50-FPN', 'Mask', 'fixBN', '2fc', '1x'] == ('38.9', '35.5')
    assert best['R50-FPN', 'Mask', 'SyncBN', '4conv1fc (SyncBN)', '1x'] == ('41.4', '37.0')
    assert best['X101-FPN', 'DCN Cascade Mask', 'SyncBN', '2fc', '1x'] == ('47.9', '40.8')
    [row] = [r for r in rows if r.name == 'mask_rcnn_r16_gcb_c3-c5_r101_fpn_syncbn_1x']
    assert row[7:12] == ('7.0', '0.778', '9.0', '41.1', '37.4')
    assert row.checkpoint.endswith('mask_rcnn_r16_gcb_c3-c5_r101_fpn_syncbn_1x_20190602-717e6dbd.pth')


def test_a_docstring_without_figures_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / 'a.py'
    config.write_text('"""Mask R-CNN, R-50-FPN, 1x."""\n')
    with pytest.raises(ValueError, match=r'a\.py: the docstring has no'):
        results_table.read_row(config)
