"""Writing files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a temporary file beside ``path``, which then takes its place: whole or not at all.

    Raises:
        OSError: the file cannot be written (full disk, no permission); what was at ``path`` is still there.
    """
    temporary = path.with_name(path.name + '.tmp')  # same folder: a rename within a file system is atomic
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # of a write, which knows no name
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """:func:`replace_file` by ``content``."""
    replace_file(path, lambda file: file.write(content))
