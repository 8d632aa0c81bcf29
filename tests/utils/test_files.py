from pathlib import Path
from typing import IO

import pytest

from mmdet.utils.files import replace_file


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    path = tmp_path / 'a.txt'
    replace_file(path, lambda file: file.write(b'first'))
    with pytest.raises(OSError, match=r'No space left on device: .*a\.txt'):
        replace_file(path, fail)
    assert path.read_bytes() == b'first' and list(tmp_path.iterdir()) == [path]
    replace_file(path, lambda file: file.write(b'second'))
    assert path.read_bytes() == b'second' and list(tmp_path.iterdir()) == [path]
