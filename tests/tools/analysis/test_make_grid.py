"""The grid of pictures, run as a command."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

TOOL = Path(__file__).parents[3] / 'tools/analysis/make_grid.py'


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_pictures_are_spread_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    for i in range(9):
        cv2.imwrite(str(tmp_path / f'in/{i}.png'), np.full((480, 480, 3), 20 * i, np.uint8))
    done = run(tmp_path / 'in', '--out', tmp_path / 'grid.png', '--num', 3, '--columns', 3)
    assert done.returncode == 0, done.stderr
    grid = cv2.imread(str(tmp_path / 'grid.png'))
    middle = grid[grid.shape[0] // 2, :, 0]
    assert [value for value in np.unique(middle) if value != 255] == [0, 80, 160]


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / 'broken.jpg').write_bytes(b'not a picture')
    nowhere = tmp_path / 'nowhere'
    for arguments, message in [
        ((nowhere, '--out', 'x.png'), f'error: {nowhere} holds no .jpg or .png file\n'),
        ((tmp_path, '--out', 'x.png'), f'error: {tmp_path / "broken.jpg"} cannot be decoded\n'),
        ((tmp_path, '--out', 'x.png', '--num', 0), 'error: --num 0: at least one picture is needed\n'),
    ]:
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (1, message)
