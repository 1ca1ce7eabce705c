"""Opening regular files only: reading a pipe would block, and reading a device might never end."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Links are followed.

    Raises:
        OSError: it cannot be opened, or it is a directory, pipe, socket or device.
    """
    # Checked before opening, because opening a device has side effects, and afterwards, because the file may be replaced.
    _require_regular(path, path.stat())
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _require_regular(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as `open_regular`, or it is larger than `most_bytes`.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes} bytes", str(path))
    return content


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
