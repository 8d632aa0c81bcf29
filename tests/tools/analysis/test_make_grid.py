"""The grid of pictures."""

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest

TOOL = Path(__file__).parents[3] / 'tools/analysis/make_grid.py'


def run(*arguments: object) -> None:
    runpy.run_path(str(TOOL))['main'](list(map(str, arguments)))


def test_pictures_are_spread_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    for i in range(9):
        cv2.imwrite(str(tmp_path / f'in/{i}.png'), np.full((480, 480, 3), 20 * i, np.uint8))
    run(tmp_path / 'in', '--out', tmp_path / 'grid.png', '--num', 3, '--columns', 3)
    grid = cv2.imread(str(tmp_path / 'grid.png'))
    middle = grid[grid.shape[0] // 2, :, 0]
    assert [value for value in np.unique(middle) if value != 255] == [0, 80, 160]


def test_pictures_of_all_formats_are_seen(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/notes.txt').write_text('no picture')
    for i, suffix in enumerate(('.JPG', '.jpeg', '.bmp', '.webp', '.tif')):
        cv2.imwrite(str(tmp_path / f'in/{i}{suffix}'), np.full((48, 48, 3), 20 * i, np.uint8))
    run(tmp_path / 'in', '--out', tmp_path / 'grid.png', '--columns', 5)
    grid = cv2.imread(str(tmp_path / 'grid.png'))
    middle = grid[grid.shape[0] // 2, :, 0]
    assert [value for value in np.unique(middle) if value != 255] == [0, 20, 40, 60, 80]


@pytest.mark.parametrize('arguments, error, message', [
    (('nowhere',), FileNotFoundError, '^nowhere: no such folder$'),
    (('empty',), FileNotFoundError, '^empty holds no picture, such as a .jpg or .png file$'),
    (('broken',), ValueError, '^broken/a.jpg cannot be decoded$'),
    (('broken', '--num', 0), ValueError, '^--num 0: at least one picture is needed$'),
])
def test_bad_input_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ('empty', 'broken'):
        Path(name).mkdir()
    Path('broken/a.jpg').write_bytes(b'not a picture')
    with pytest.raises(error, match=message):
        run(*arguments, '--out', 'x.png')
