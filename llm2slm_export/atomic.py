"""Directories that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2slm_export.errors import UsageError


@contextmanager
def replaced_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty sibling directory that becomes `target` when the block ends well, and vanishes when it does not.

    The new content is synced to disk before it takes the name; an existing target is moved aside first and deleted
    last, so at every moment `target` is the old directory, absent, or the new one: never half of either.

    Raises:
        UsageError: `target` exists and `force` is not set; before any work is done.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not force:
        raise UsageError(
            f"{target} exists already.", remedy="choose another --out, or add --force to replace it once the new one is complete"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        _sync(temporary)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """Finish what a killed run left: put an old directory back if the new one never took its place, drop the rest."""
    for old in target.parent.glob(f".{target.name}.old-*"):
        if not target.exists() and (old / target.name).exists():
            os.replace(old / target.name, target)
        shutil.rmtree(old, ignore_errors=True)
    for partial in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
