import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from mmdet.engine.hooks.draw_hook import DrawHook


def draw(out_dir: Path, prefix: Path, *images: Path) -> None:
    dataset = SimpleNamespace(metainfo=dict(classes=('a',), palette=[(255, 0, 0)]),
                              data_prefix=dict(img=str(prefix)))
    prediction = dict(boxes=np.array([[1.0, 1, 6, 6]]), scores=np.array([0.9]), labels=np.array([0]))
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset))
    DrawHook(str(out_dir)).after_test_iter(
        runner, 0, outputs=[dict(prediction, img_path=str(path)) for path in images])


def make_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', np.zeros((9, 12, 3), np.uint8))[1].tobytes())
    return path


def test_pictures_have_the_names_of_their_images(tmp_path: Path) -> None:
    images = [make_image(tmp_path / 'data' / name) for name in ('a.png', 'sub/a.png', 'b.jfif', 'c', 'd.pgm')]
    draw(tmp_path / 'out', tmp_path / 'data', *images)
    found = sorted(str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*.*'))
    assert found == ['a.png', 'b.jfif.jpg', 'c.jpg', 'd.pgm.jpg', 'sub/a.png']
    assert cv2.imread(str(tmp_path / 'out' / 'a.png')).any()


def test_a_picture_stays_in_its_folder(tmp_path: Path) -> None:
    make_image(tmp_path / 'other' / 'a.png')
    (tmp_path / 'data').mkdir()
    draw(tmp_path / 'out' / 'in', tmp_path / 'data', tmp_path / 'data' / '..' / 'other' / 'a.png')
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / 'out').rglob('*.png')] == ['out/in/a.png']


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
