"""One safetensors file of arrays and what they are, that appears whole or not at all and knows when it is damaged.

It knows no tensor's meaning. Never pickle: reading a file runs none of it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm2slm_export.atomic import Replacement, cached_file
from llm2slm_export.errors import EncodingError, UsageError
from llm2slm_export.runtime.backend import Array
from llm2slm_export.target import Kind

_CHECKSUM = "sha256"


def write_tensors(
    path: Path, tensors: Mapping[str, Array], about: Mapping[str, str], *, cached: bool = False, option: str = "path"
) -> None:
    """Write a file beside its place and give it its name. Only its owner can read it: it is made of prompts.

    Args:
        path: where; a link is followed, and a file that this function wrote is replaced, and no other.
        about: kept with the tensors; the key `sha256` is the file's own.
        cached: the name is the cache's own: any file there is replaced, and a power cut may leave a damaged one, which
            reading it tells.
        option: how the user said the path.

    Raises:
        EncodingError: it cannot be written there.
    """
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = {**about, _CHECKSUM: _checksum(whole, about)}
    if not path.parent.is_dir():
        raise _unwritable(path, f"there is no directory {path.parent}")
    try:
        if cached:
            writing = cached_file(path, private=True, clear=False)
        else:
            writing = Replacement(path, TENSORS, option=option).written(private=True)
        with writing as new:
            save_file(whole, new, metadata=metadata)
    except UsageError as error:
        raise EncodingError(error.fact, *error.evidence, remedy=error.remedy) from error
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _unwritable(path, reason) from error


def _unwritable(path: Path, reason: str) -> EncodingError:
    return EncodingError(
        f"{path} cannot be written.", reason, remedy="give a path in a directory that exists, with room to write"
    )


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a file and what was said about them.

    Raises:
        EncodingError: there is no such file, or it is not one that `write_tensors` wrote, or it is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = dict(file.metadata() or {})
            tensors: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, str(error)) from error
    expected = about.pop(_CHECKSUM, None)
    if expected is None:
        raise _unreadable(path, "it holds tensors, but none that this package wrote")
    if expected != (got := _checksum(tensors, about)):
        raise _unreadable(path, f"expected sha256 {expected[:16]}… of its content, got {got[:16]}…")
    return tensors, about


def _unreadable(path: Path, reason: str) -> EncodingError:
    return EncodingError(f"{path} cannot be read as an encoding.", reason, remedy="copy it again, or encode again")


def _foreign(path: Path) -> list[str]:
    """Why a file is not one that `write_tensors` wrote; it may be damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            ours = _CHECKSUM in (file.metadata() or {})
    except (SafetensorError, OSError):
        ours = False
    return [] if ours else ["it is not an encoding: it is no file that this package wrote"]


TENSORS = Kind("an encoding", _foreign, is_file=True)


def _checksum(tensors: Mapping[str, Array], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.data if tensor.size else b"")
    return digest.hexdigest()
