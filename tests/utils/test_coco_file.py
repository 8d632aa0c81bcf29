import json
from array import array
from pathlib import Path

import pytest

from mmdet.datasets.annotation_file import pack_polygons
from mmdet.utils.coco_file import read_annotation_file

GOOD = dict(images=[dict(id=1)], annotations=[dict(id=2, segmentation=[[0.5, 1, 2, 3, 4, 5]])], categories=[])


@pytest.mark.parametrize('content, error, message', [
    (None, FileNotFoundError, 'no annotation file {}: configs name it by data_root and ann_file'),
    ('', ValueError, '{} is not a JSON file: Expecting value: line 1 column 1'),
    ('{', ValueError, '{} is not a JSON file: Expecting property name'),
    ('[' * 100_000, ValueError, '{} is not a JSON file: '),
    ('\udcff', ValueError, "{} is not a JSON file: 'utf-8' codec can't decode"),
    ('[]', ValueError, "{} is not an annotation file in COCO's format: no list 'images' in it"),
    ('{"images": [], "annotations": {}}', ValueError, "{} is .*: no list 'annotations' in it"),
    ('{"images": [], "annotations": []}', ValueError, "{} is .*: no list 'categories' in it"),
])  # fmt: skip
def test_unreadable_files_are_errors(
    tmp_path: Path, content: str | None, error: type[Exception], message: str
) -> None:
    path = tmp_path / 'gt.json'
    if content is not None:
        path.write_text(content, errors='surrogateescape')
    with pytest.raises(error, match=message.format(path)) as caught:
        read_annotation_file(path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('mark', ['', '\ufeff'])  # editors on Windows begin a file with it
def test_what_is_read(tmp_path: Path, mark: str) -> None:
    (tmp_path / 'gt.json').write_text(mark + json.dumps(GOOD), encoding='utf-8')
    assert read_annotation_file(tmp_path / 'gt.json') == GOOD
    packed = read_annotation_file(str(tmp_path / 'gt.json'), pack_polygons)
    assert packed['annotations'][0]['segmentation'] == [array('d', [0.5, 1, 2, 3, 4, 5])]


def test_annotations_need_not_be_there(tmp_path: Path) -> None:
    (tmp_path / 'gt.json').write_text('{"images": [], "categories": []}')
    assert read_annotation_file(tmp_path / 'gt.json', annotated=False)['annotations'] == []
    (tmp_path / 'gt.json').write_text('[]')
    with pytest.raises(ValueError, match="no list 'images' in it"):
        read_annotation_file(tmp_path / 'gt.json', annotated=False)
