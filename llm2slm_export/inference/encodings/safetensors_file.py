"""Safetensors files of arrays and metadata, in memory and written atomically, with a checksum of their content."""

import hashlib
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save, save_file

from llm2slm_export.arrays import Array
from llm2slm_export.errors import EncodingError, UsageError
from llm2slm_export.files.atomic import Replacement, cached_file
from llm2slm_export.files.bounded_json import JsonError, parse_json
from llm2slm_export.files.output_target import Kind
from llm2slm_export.files.regular_file import open_regular

_CHECKSUM = "sha256"
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_MOST_HEADER = 4_000_000
_MOST_AXES = 8
_DTYPES = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def write_tensors(
    path: Path, tensors: Mapping[str, Array], about: Mapping[str, str], *, cached: bool = False, option: str = "path"
) -> None:
    """Write tensors and metadata to a file. Only its owner can read it, because prompts can be recovered from encodings.

    Args:
        path: the file. A link is followed. Only a file written by this function is replaced.
        about: metadata, without the key `sha256`.
        cached: write without waiting for the disk, and replace any file. After a power failure the file may be damaged;
            `read_tensors` detects that.
        option: the command-line option of the path, for messages.

    Raises:
        EncodingError: the file cannot be written.
    """
    whole, metadata = _with_checksum(tensors, about)
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


def dump_tensors(tensors: Mapping[str, Array], about: Mapping[str, str]) -> bytes:
    """The content of the file that `write_tensors` writes."""
    whole, metadata = _with_checksum(tensors, about)
    return bytes(save(whole, metadata=metadata))


def _with_checksum(tensors: Mapping[str, Array], about: Mapping[str, str]) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors and the metadata of a file."""
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return whole, {**about, _CHECKSUM: _checksum(whole, about)}


def _unwritable(path: Path, reason: str) -> EncodingError:
    return EncodingError(
        f"{path} cannot be written.", reason, remedy="give a path in a directory that exists, with room to write"
    )


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read the tensors and metadata of a file.

    Raises:
        EncodingError: the file is missing, damaged, or was not written by `write_tensors`.
    """
    try:
        with open_regular(path) as opened:
            _check_header(opened, str(path))
        with safe_open(path, framework="numpy") as file:
            about = dict(file.metadata() or {})
            tensors: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(str(path), getattr(error, "strerror", None) or str(error)) from error
    _check_content(tensors, about, str(path))
    return tensors, about


def parse_tensors(data: bytes, source: str) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors and metadata in the content of a file.

    Args:
        source: where it is from, as the subject of an error's sentence.

    Raises:
        EncodingError: it is damaged, or was not made by `write_tensors` or `dump_tensors`.
    """
    about = _check_header(BytesIO(data), source)
    try:
        tensors = dict(load(data))
    except (SafetensorError, ValueError) as error:
        raise _unreadable(source, str(error)) from error
    _check_content(tensors, about, source)
    return tensors, about


def _check_content(tensors: Mapping[str, Array], about: dict[str, str], source: str) -> None:
    """Compare the checksum, and remove it from the metadata."""
    expected = about.pop(_CHECKSUM, None)
    if expected is None:
        raise _unreadable(source, f"its metadata has no {_CHECKSUM}: this package did not write it")
    if expected != (got := _checksum(tensors, about)):
        raise _unreadable(source, f"expected sha256 {expected[:16]}… of its content, got {got[:16]}…")


def _check_header(file: BinaryIO, source: str) -> dict[str, str]:
    """Refuse types and shapes that NumPy lacks, and headers above the bound, before safetensors reads the file.

    Returns:
        The metadata.
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > _MOST_HEADER:
        raise _unreadable(source, f"its header is declared as {length} bytes; at most {_MOST_HEADER} are read")
    try:
        header = parse_json(file.read(length))
    except JsonError as error:
        raise _unreadable(source, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _unreadable(source, "its header does not describe tensors")
    about = header.pop(_METADATA, None) or {}
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if dtype not in _DTYPES:
            raise _unreadable(source, f"it holds tensors of type {dtype!r}")
        if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(_is_size(axis) for axis in shape):
            raise _unreadable(source, f"the tensor {name!r} has an invalid shape")
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise _unreadable(source, "its metadata is not text")
    return about


def _is_size(axis: object) -> bool:
    return isinstance(axis, int) and not isinstance(axis, bool) and 0 <= axis < 2**31


def _unreadable(source: str, reason: str) -> EncodingError:
    return EncodingError(f"{source} cannot be read as an encoding.", reason, remedy="copy it again, or encode again")


def _foreign(path: Path) -> list[str]:
    """The reason why a file was not written by `write_tensors`. A damaged file written by it counts as written."""
    try:
        with safe_open(path, framework="numpy") as file:
            ours = _CHECKSUM in (file.metadata() or {})
    except (SafetensorError, OSError):
        ours = False
    return [] if ours else ["it is not an encoding: this package did not write it"]


TENSORS = Kind("an encoding", _foreign, is_file=True)


def _checksum(tensors: Mapping[str, Array], about: Mapping[str, str]) -> str:
    """The sha256 of the metadata and of every tensor's name, type, shape and bytes, both in the order of their names.

    What describes them is canonical JSON: sorted keys, no spaces, ASCII only. C++ writes the same.
    """
    digest = hashlib.sha256(_canonical(dict(about)))
    for name, tensor in sorted(tensors.items()):
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.data if tensor.size else b"")
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
