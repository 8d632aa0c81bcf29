import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from mmdet.engine.hooks.draw_hook import DrawHook


def draw(out_dir: Path, prefix: Path, *images: Path) -> list[str]:
    """Draw an object on each image; returns the warnings."""
    warnings: list[str] = []
    dataset = SimpleNamespace(metainfo=dict(classes=('a',), palette=[(255, 0, 0)]),
                              data_prefix=dict(img=str(prefix)))
    prediction = dict(boxes=np.array([[1.0, 1, 6, 6]]), scores=np.array([0.9]), labels=np.array([0]))
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset),
                             logger=SimpleNamespace(warning=warnings.append))
    DrawHook(str(out_dir)).after_test_iter(
        runner, 0, outputs=[dict(prediction, img_path=str(path)) for path in images])
    return warnings


def make_image(path: Path, width: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', np.zeros((9, width, 3), np.uint8))[1].tobytes())
    return path


def test_pictures_have_the_names_of_their_images(tmp_path: Path) -> None:
    images = [make_image(tmp_path / 'data' / name) for name in ('a.png', 'sub/a.png', 'b.jfif', 'c', 'd.pgm')]
    draw(tmp_path / 'out', tmp_path / 'data', *images)
    found = sorted(str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*.*'))
    assert found == ['a.png', 'b.jfif.jpg', 'c.jpg', 'd.pgm.jpg', 'sub/a.png']
    assert cv2.imread(str(tmp_path / 'out' / 'a.png')).any()


def test_a_picture_stays_in_its_folder(tmp_path: Path) -> None:
    """Of images outside the data set's folder too, where two may have one name."""
    for name in ('other', 'third'):
        make_image(tmp_path / name / 'a.png')
    (tmp_path / 'data').mkdir()
    draw(tmp_path / 'out' / 'in', tmp_path / 'data', tmp_path / 'data' / '..' / 'other' / 'a.png',
         tmp_path / 'third' / 'a.png')
    found = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / 'out').rglob('*.png'))
    assert found == ['out/in/other/a.png', 'out/in/third/a.png']


def test_a_picture_that_cannot_be_written_is_logged(tmp_path: Path) -> None:
    long = make_image(tmp_path / 'data' / 'long.jpg', 66_000)  # a PNG in truth: a JPEG ends at 65,500 pixels
    taken, image = (make_image(tmp_path / 'data' / name) for name in ('taken.png', 'a.png'))
    (tmp_path / 'out' / 'taken.png').mkdir(parents=True)
    warnings = draw(tmp_path / 'out', tmp_path / 'data', long, taken, image)
    assert [warning.partition(' was not written: ')[0] for warning in warnings] == [
        f'the picture of {long}', f'the picture of {taken}']
    assert '66000 x 9 pixels cannot be written' in warnings[0] and 'Is a directory' in warnings[1]
    assert (tmp_path / 'out' / 'a.png').is_file()


@pytest.mark.parametrize('linked', [False, True])
def test_an_image_is_not_replaced(tmp_path: Path, linked: bool) -> None:
    image = make_image(tmp_path / 'data' / 'a.png')
    before = image.read_bytes()
    out = tmp_path / 'data'
    if linked:
        out = tmp_path / 'out'
        os.symlink(tmp_path / 'data', out)
    with pytest.raises(ValueError, match=r'a.png: give another folder'):
        draw(out, tmp_path / 'data', image)
    assert image.read_bytes() == before
