"""The cache of encodings that the options --cache and --cache-mb ask for."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm2slm_export.inference.encodings.cache import EncodingCache


def open_cache(directory: Path | None, megabytes: int | None) -> "EncodingCache | None":
    """The cache. `directory` None: in memory alone; both None: no cache.

    Raises:
        UsageError: the directory cannot be created.
    """
    if directory is None and megabytes is None:
        return None
    from llm2slm_export.inference.encodings.cache import DEFAULT_BYTES, EncodingCache

    return EncodingCache(max_bytes=DEFAULT_BYTES if megabytes is None else megabytes * 10**6, directory=directory)


def cache_in_bundle(directory: Path | None, bundles: Iterable[Path]) -> Path | None:
    """The bundle that a cache's directory lies in; None: in none."""
    if directory is None:
        return None
    whole = directory.resolve()
    return next((bundle for bundle in bundles if bundle.resolve() in (whole, *whole.parents)), None)
