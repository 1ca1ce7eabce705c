"""Directories and files that appear whole or not at all."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2slm_export.errors import UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replaced_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty sibling directory that becomes `target` when the block ends well, and vanishes when it does not.

    The new content is synced to disk before it takes the name. Where the system can exchange two names in one step
    (Linux), `target` is the old directory or the new one at every moment.

    Raises:
        UsageError: `target` exists and `force` is not set; before any work is done.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not force:
        raise UsageError(
            f"{target} exists already.",
            remedy="choose another --out, or add --force to replace it once the new one is complete",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        _sync(temporary)
        if target.exists():
            _exchange(temporary, target)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replaced_file(target: Path, text: str) -> None:
    """Write a text file that is there whole, or as it was before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _exchange(new: Path, old: Path) -> None:
    """Give `new` the name of `old` and the other way round; the caller removes what then has the temporary name."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(new), os.fsencode(old)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    # Some file systems, and systems other than Linux, cannot: two renames, with the old directory kept until the end.
    aside = new.with_name(new.name + ".replaced")
    os.replace(old, aside)
    os.replace(new, old)
    os.replace(aside, new)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
